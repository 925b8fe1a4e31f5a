"""Two small tasks of lm-eval, with their data in files: one scores answers, one generates them."""

import json
from pathlib import Path

import pytest

CHOICE = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
GENERATE = """
task: spelling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "The capital of {{{{country}}}} is "
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["e", "\\n"], max_gen_toks: 12}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.0}}
"""
GROUP = """
group: geography
task: [capitals]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""
COUNTRIES = ("France", "Italy", "Norway", "Japan", "Chile", "Kenya", "Spain", "Egypt", "Nepal", "Peru")
CITIES = ("Paris", "Rome", "Oslo", "Tokyo", "Santiago", "Nairobi", "Madrid", "Cairo", "Kathmandu", "Lima")


def write_tasks(folder: Path) -> None:
    data = folder / "capitals.jsonl"
    with data.open("w") as file:
        for index, country in enumerate(COUNTRIES):
            choices = [CITIES[(index + step) % len(CITIES)] for step in (0, 3, 7)]
            file.write(json.dumps({"country": country, "choices": choices, "answer": 0}) + "\n")
    (folder / "capitals.yaml").write_text(CHOICE.format(data=data))
    (folder / "spelling.yaml").write_text(GENERATE.format(data=data))
    (folder / "geography.yaml").write_text(GROUP)


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from datasets import config

    config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")  # not the user's
    folder = tmp_path_factory.mktemp("tasks")
    write_tasks(folder)
    return folder
