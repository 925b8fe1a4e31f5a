"""train(): a drafter's head for a model, in a folder; a run that was killed goes on where it was.

    O/texts.jsonl                   what the target said; kept, so that other heads can learn from it
    O/training/hidden-*.safetensors its hidden states at each token
    O/training/state.safetensors    parameters and Adam's moments after some step; nothing is pickled
    O/config.json, …                the head, when all is done, and the folder `training` goes

Equal seeds give equal bytes, with and without interruption: the order of texts comes from seed and epoch, and a state
is all that a step depends on.
"""

import contextlib
import gc
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import slipstream
from slipstream.api.building import BuildOptions, engine_path
from slipstream.api.llm import LLM
from slipstream.build.cache import device_for, tuned_choices
from slipstream.checkpoint import resolve
from slipstream.distill.hidden import HiddenFiles
from slipstream.distill.texts import PromptSource, Text, TextSettings, answer, read_texts
from slipstream.engine.folder import Engine, open_engine
from slipstream.engine.tensor_file import TensorFile, write_tensor_file
from slipstream.errors import EngineError, UsageError
from slipstream.progress import Progress
from slipstream.runtime.worker.ends import embedding_of
from slipstream.runtime.worker.weights import load_weights
from slipstream.speculative.training import Batch, Student, Teacher, student_of

HELD_OUT = 16  # one text in so many
SECONDS_BETWEEN_STATES = 30.0
WARM_UP = 0.05  # of the steps, in which the learning rate rises
SORTED_AT_ONCE = 16  # batches whose texts are sorted by length: little padding, and other company in each epoch


@dataclass(frozen=True, kw_only=True)
class Settings:
    method: str
    options: dict[str, int]  # of the method's own
    num_epochs: int
    learning_rate: float
    batch_size: int  # texts of a step
    seed: int


@dataclass(frozen=True)
class Result:
    acceptance: list[float]  # of what was held out: the share of steps in which so many drafts at least are accepted
    losses: list[float]  # the mean of each epoch that this run has seen
    num_tokens: int  # that the target said, held-out ones included

    @property
    def acceptance_length(self) -> float:
        return 1 + sum(self.acceptance)


def train(
    output_dir: Path, texts: TextSettings, prompts: PromptSource, settings: Settings, *, device: str,
    max_batch_size: int | None, progress: Progress,
) -> Result:  # fmt: skip
    """Raises UsageError for a method that is not trained, an option that it does not know, and a folder in use."""
    kind = student_of(settings.method)
    options = _options(kind, settings)
    work = _open_folder(output_dir)
    where = device_for(device)
    build = BuildOptions(dtype=texts.dtype, max_batch_size=max_batch_size)
    path = engine_path(resolve(texts.model), build, where, show_progress=True)
    engine = open_engine(path)
    if engine.manifest.num_ranks > 1:
        raise EngineError(
            f"{texts.model} was built for {engine.manifest.num_ranks} ranks; give the model, or an engine of "
            "--tp_size 1."
        )
    said = read_texts(output_dir / "texts.jsonl", texts)
    if len(said) < texts.num_texts:
        with LLM(str(path), device=device, max_batch_size=max_batch_size, enable_block_reuse=False) as llm:
            said = answer(llm, output_dir / "texts.jsonl", texts, prompts, progress)
        _free_memory(where)
    layers = kind.reads_hidden(engine.manifest.num_layers)
    hidden = HiddenFiles(work, [[*text.prompt, *text.answer] for text in said], layers) if layers else None
    if hidden is not None:
        if not engine.has_hidden_states:
            raise EngineError(f"{path} gives no hidden states, being of an older build; build it again.")
        hidden.write(engine, tuned_choices(engine, where), where, progress)
        _free_memory(where)
    data = Data(said, hidden, where)
    counts = data.counts(engine.manifest.vocab_size)
    embed = _embedding(engine, where) if kind.reads_embedding else None
    with torch.random.fork_rng(devices=[where] if where.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        student = kind(Teacher(texts.model, engine, where, counts, embed), options).to(where)
    loop = Loop(student, data, settings, work / "state.safetensors", _digest(texts, settings, said))
    with _quick_products(where):
        losses = loop.run(progress)
    progress("evaluate", 0, 1)
    with torch.inference_mode():
        acceptance = student.evaluate(data.batch(chunk) for chunk in data.held_out.split(settings.batch_size))
    result = Result(acceptance, losses, sum(len(text.answer) for text in said))
    student.save(output_dir, _facts(engine, texts, settings, result))
    if hidden is not None:
        hidden.close()
    shutil.rmtree(work)
    engine.close()
    return result


def _free_memory(device: torch.device) -> None:
    """Of a GPU, for what comes next: the KV cache of an engine that is closed, whose worker is part of a cycle."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _quick_products(device: torch.device) -> Iterator[None]:
    """On a GPU of float32 by TensorFloat-32, which keeps 10 bits of each factor and is several times as fast."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _embedding(engine: Engine, device: torch.device) -> Callable[[Tensor], Tensor]:
    weights = load_weights(engine.weights, list(engine.graph.weights), device)
    return embedding_of(engine, weights, tuned_choices(engine, device), device)


def _options(kind: type[Student], settings: Settings) -> Any:
    known = kind.options_type.__dataclass_fields__
    for name in settings.options:
        if name not in known:
            raise UsageError(
                f"--{name} was given, which {settings.method} does not have; it has --{', --'.join(known)}."
            )
    return kind.options_type(**settings.options)


def _open_folder(output_dir: Path) -> Path:
    """Its folder of what is needed until the end. Raises UsageError where something else is there."""
    is_ours = (output_dir / "texts.jsonl").is_file()
    try:
        if not is_ours and output_dir.exists() and any(output_dir.iterdir()):
            raise UsageError(f"{output_dir} is not empty and holds no texts.jsonl of a training; give a new folder.")
        work = output_dir / "training"
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{output_dir} cannot be written ({error.strerror}); give another --output_dir.") from None
    return work


def _digest(texts: TextSettings, settings: Settings, said: Sequence[Text]) -> str:
    facts = {"texts": asdict(texts), "settings": asdict(settings), "said": said, "version": slipstream.__version__}
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _facts(engine: Engine, texts: TextSettings, settings: Settings, result: Result) -> dict[str, Any]:
    return {
        "base_model": engine.manifest.name,
        "hidden_size": engine.manifest.hidden_size,
        "vocab_size": engine.manifest.vocab_size,
        "held_out_acceptance": [round(share, 4) for share in result.acceptance],
        "held_out_acceptance_length": round(result.acceptance_length, 3),
        "training": {"num_tokens": result.num_tokens, "texts": asdict(texts), **asdict(settings)},
    }


class Data:
    """Texts with their hidden states, some of them held out."""

    def __init__(self, texts: Sequence[Text], hidden: HiddenFiles | None, device: torch.device) -> None:
        self._texts, self._hidden, self._device = texts, hidden, device
        lengths = torch.tensor([len(text.prompt) + len(text.answer) for text in texts])
        is_held_out = torch.arange(len(texts)) % HELD_OUT == 0
        self.held_out, self.trained = is_held_out.nonzero()[:, 0], (~is_held_out).nonzero()[:, 0]
        self.held_out = self.held_out[lengths[self.held_out].argsort(stable=True)]
        self._trained_lengths = lengths[self.trained]

    def counts(self, vocab_size: int) -> Tensor:
        """[V] how often the target says each token, where it is learned from."""
        said = [token_id for index in self.trained.tolist() for token_id in self._texts[index].answer]
        return torch.bincount(torch.tensor(said, dtype=torch.int64), minlength=vocab_size)

    def epoch(self, batch_size: int, generator: torch.Generator) -> list[Tensor]:
        """The texts of each step, about as long as each other."""
        batches = batches_of_like_lengths(self._trained_lengths, batch_size, generator)
        return [self.trained[batch] for batch in batches]

    def batch(self, indices: Tensor) -> Batch:
        texts = [self._texts[index] for index in indices.tolist()]
        token_ids = [torch.tensor([*text.prompt, *text.answer]) for text in texts]
        is_answer = [torch.arange(len(ids)) >= len(text.prompt) for ids, text in zip(token_ids, texts, strict=True)]
        hidden = None
        if self._hidden is not None:  # as narrow as it is kept, until it is there
            hidden = self._padded([self._hidden.read(index) for index in indices.tolist()]).float()
        return Batch(self._padded(token_ids), self._padded(is_answer), hidden)

    def _padded(self, rows: list[Tensor]) -> Tensor:
        padded = pad_sequence(rows, batch_first=True)
        if self._device.type != "cuda":
            return padded
        return padded.pin_memory().to(self._device, non_blocking=True)  # while it computes the step before


def batches_of_like_lengths(lengths: Tensor, batch_size: int, generator: torch.Generator) -> list[Tensor]:
    """All places of `lengths`, each in one batch; which ones share one, and the order of batches, is random."""
    groups = torch.randperm(len(lengths), generator=generator).split(SORTED_AT_ONCE * batch_size)
    by_length = [group[lengths[group].argsort(stable=True)] for group in groups]
    batches = [batch for group in by_length for batch in group.split(batch_size)]
    return [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]


class Loop:
    """The steps from the last state on."""

    def __init__(self, student: Student, data: Data, settings: Settings, path: Path, digest: str) -> None:
        self._student, self._data, self._settings = student, data, settings
        self._path, self._digest = path, digest
        self._optimizer = torch.optim.AdamW(student.parameters(), lr=settings.learning_rate, weight_decay=0.0)
        self._per_epoch = math.ceil(len(data.trained) / settings.batch_size)
        self._total = settings.num_epochs * self._per_epoch
        self._epoch, self._batches = -1, list[Tensor]()  # of the last step

    def run(self, progress: Progress) -> list[float]:
        """Mean losses of the epochs, as far as this run has seen them."""
        losses: dict[int, list[Tensor]] = {}
        done, saved_at = self._restore(), time.monotonic()
        for step in range(done, self._total):
            progress("train", step, self._total)
            losses.setdefault(step // self._per_epoch, []).append(self._step(step))
            if time.monotonic() - saved_at > SECONDS_BETWEEN_STATES or step + 1 == self._total:
                self._save(step + 1)
                saved_at = time.monotonic()
        return [float(torch.stack(each).mean()) for each in losses.values()]

    def _step(self, step: int) -> Tensor:
        """Its loss, which a GPU may still be computing."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * self._share_of_rate(step)
        loss = self._student.loss(self._data.batch(self._indices(step)))
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._student.parameters(), 1.0)
        self._optimizer.step()
        return loss.detach()

    def _indices(self, step: int) -> Tensor:
        epoch, place = divmod(step, self._per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self._settings.seed * 1_000_003 + epoch)
            self._epoch, self._batches = epoch, self._data.epoch(self._settings.batch_size, generator)
        return self._batches[place]

    def _share_of_rate(self, step: int) -> float:
        """Up in a line, down in half a cosine."""
        warm_up = max(1, round(WARM_UP * self._total))
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, self._total - warm_up)))

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that a step depends on besides its number."""
        for name, parameter in self._student.named_parameters():
            state = self._optimizer.state[parameter]
            yield f"parameter.{name}", parameter.detach()
            yield f"mean.{name}", state["exp_avg"]
            yield f"variance.{name}", state["exp_avg_sq"]

    def _save(self, step: int) -> None:
        entries = [(name, tuple(each.shape), each.dtype, lambda each=each: each) for name, each in self._tensors()]
        write_tensor_file(self._path, entries, {"format": "pt", "step": str(step), "digest": self._digest})

    def _restore(self) -> int:
        """How many steps the state has behind it, which is taken over; 0 where there is none of this training."""
        if not self._path.is_file():
            return 0
        with TensorFile.open(self._path) as file:
            if file.metadata.get("digest") != self._digest:
                return 0
            step = int(file.metadata["step"])
            for parameter in self._student.parameters():
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
            for name, tensor in self._tensors():
                tensor.copy_(file.read(name))
        return step
