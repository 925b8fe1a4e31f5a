"""The sampling flags of `slipstream run`, with the names and defaults of TensorRT-LLM's examples/run.py."""

from dataclasses import dataclass, fields
from pathlib import Path

from slipstream.cli._prompts import read_text
from slipstream.errors import UsageError
from slipstream.schema.guided import Guided
from slipstream.schema.sampling import SamplingParams

_FOR_BEAMS_ONLY = ("length_penalty", "early_stopping")
_FOR_BEAMS_TOO = ("max_output_len", "num_beams", "num_return_sequences", "random_seed", "end_id", *_FOR_BEAMS_ONLY)
_NO_END = -1  # run.py's end_id of a model that has none


@dataclass(frozen=True, kw_only=True)
class RunSampling:
    """The flags as they were typed; `params()` says the same in our own words.

    Two defaults surprise: top_k 1 is greedy whatever the temperature, and top_p 0 is off.
    """

    max_output_len: int = 128
    num_beams: int = 1
    num_return_sequences: int | None = None  # all beams; without beams 1
    temperature: float = 1.0
    top_k: int = 1
    top_p: float = 0.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: int = 1
    no_repeat_ngram_size: int = 0
    random_seed: int = 0
    stop_words: tuple[str, ...] = ()
    bad_words: tuple[str, ...] = ()
    guided_json: str | None = None
    guided_regex: str | None = None
    guided_choice: tuple[str, ...] = ()
    guided_grammar: Path | None = None
    end_id: int | None = None

    @property
    def num_outputs(self) -> int:
        return self.num_return_sequences or self.num_beams

    def params(self) -> SamplingParams:
        """Raises UsageError for flags that contradict each other, RequestError for values out of range."""
        return self._beams() if self.num_beams > 1 else self._samples()

    def without_effect(self) -> list[str]:
        """The flags that choose among tokens, where greedy search leaves no choice."""
        choosing = ("temperature", "top_p", "min_p", "typical_p")
        return [name for name in self._changed() if name in choosing] if self.top_k == 1 and self.temperature else []

    def _samples(self) -> SamplingParams:
        for name in self._changed():
            if name in _FOR_BEAMS_ONLY:
                raise UsageError(f"--{name} means something only to a beam search; add --num_beams 2 or more.")
        if self.num_outputs > 1 and self.top_k == 1:
            raise UsageError(
                f"--num_return_sequences is {self.num_outputs}, but --top_k 1 (the default) always takes the likeliest "
                "token and would return equal texts; add --top_k 0 to sample from all tokens."
            )
        return SamplingParams(
            n=self.num_outputs,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p or 1.0,
            min_p=self.min_p,
            typical_p=self.typical_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            no_repeat_ngram_size=self.no_repeat_ngram_size,
            bad_words=self.bad_words,
            stop=self.stop_words,
            max_tokens=self.max_output_len,
            seed=self.random_seed,
            stop_token_ids=self._stop_token_ids(),
            ignore_eos=self.end_id is not None,
            guided=self._guided(),
        )

    def _guided(self) -> Guided | None:
        given = [f"--{name}" for name in self._changed() if name.startswith("guided_")]
        if not given:
            return None
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} were both given; a text follows one of them, so leave one out.")
        if self.end_id is not None:
            raise UsageError(f"--end_id means nothing with {given[0]}, which says where a text ends; leave it out.")
        if self.guided_grammar is not None:
            return Guided(grammar=read_text(self.guided_grammar, "--guided_grammar"))
        if self.guided_json is not None:
            is_schema = self.guided_json.lstrip().startswith("{")
            return Guided(
                json_schema=self.guided_json if is_schema else read_text(Path(self.guided_json), "--guided_json")
            )
        return Guided(regex=self.guided_regex, choice=self.guided_choice or None)

    def _beams(self) -> SamplingParams:
        for name in self._changed():
            if name not in _FOR_BEAMS_TOO:
                raise UsageError(
                    f"--{name} means nothing to a beam search, which compares whole texts; leave it or --num_beams out."
                )
        if self.num_outputs > self.num_beams:
            raise UsageError(
                f"--num_return_sequences is {self.num_outputs}, more than --num_beams {self.num_beams}; raise that."
            )
        return SamplingParams(
            use_beam_search=True,
            best_of=self.num_beams,
            n=self.num_outputs,
            length_penalty=self.length_penalty,
            early_stopping=bool(self.early_stopping),
            max_tokens=self.max_output_len,
            seed=self.random_seed,
            stop_token_ids=self._stop_token_ids(),
            ignore_eos=self.end_id is not None,
        )

    def _stop_token_ids(self) -> tuple[int, ...]:
        return () if self.end_id is None or self.end_id == _NO_END else (self.end_id,)

    def _changed(self) -> list[str]:
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]
