"""Training: it learns, it says what it has over the baselines, it goes on after a kill as if nothing had been, and its
adapters are PEFT's.
"""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shutil
import signal
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers

import lora.training.finetune
import lora.training.run
from exporter.task import Request, export_task
from lora.errors import AdapterError, CheckpointError, LorafuseError
from lora.training.examples import Columns, Kind
from lora.training.finetune import Course, finetune
from lora.training.learner import Size
from lora.training.run import Schedule
from scripts.support.demo_tasks import DATA, SUPERSENSE

QUICK = Schedule(epochs=2, batch=4, rate=5e-3, patience=0)
TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 30522,
}
GLOSSES = [json.loads(line) for line in (DATA / "supersense_held_out.jsonl").read_text(encoding="utf-8").splitlines()]


def quiet(step: str, share: float | None = None, /) -> None:
    pass


def save_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, real_base: Path) -> dict[Kind, Path]:
    """A tiny encoder and a tiny decoder with MiniLM's real tokenizer."""
    folder = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**TINY)).save_pretrained(folder / "encoder")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY, eos_token_id=102)).save_pretrained(
        folder / "decoder"
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_base)
    tokenizer.save_pretrained(folder / "encoder")
    tokenizer.eos_token = "[SEP]"
    tokenizer.save_pretrained(folder / "decoder")
    return {"classification": folder / "encoder", "regression": folder / "encoder", "causal-lm": folder / "decoder"}


@pytest.fixture
def course(bases: dict[Kind, Path], tmp_path: Path) -> Callable[..., Course]:
    """A short course on the glosses of two classes, their lengths, or their text."""

    def made(kind: Kind = "classification", count: int = 40, **changes: Any) -> Course:
        chosen = [row for row in GLOSSES if row["target"] in (1, 9)][:count]
        targets = {
            "classification": lambda row: SUPERSENSE.labels[int(row["target"])],
            "regression": lambda row: len(row["text"]),
            "causal-lm": lambda row: "",
        }
        rows = [{"text": row["text"], "label": targets[kind](row)} for row in chosen]
        given = Course(bases[kind], save_rows(tmp_path / f"{kind}.jsonl", rows), kind, schedule=QUICK, longest=16)
        return replace(given, **changes)

    return made


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def killed(course: Course, out: Path, die: Callable[[], Callable[..., None]]) -> None:
    """Train in a process that dies by SIGKILL on the way."""
    child = os.fork()
    if child == 0:
        try:
            finetune(course, out, die())
        except BaseException:
            traceback.print_exc()
        os._exit(1)  # it was to be killed before
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


def die_at(step: int) -> Callable[..., None]:
    def report(said: str, share: float | None = None, /) -> None:
        if said.startswith(f"step {step} "):
            os.kill(os.getpid(), signal.SIGKILL)

    return report


def die_in_checkpoint(number: int) -> Callable[..., None]:
    """Just before a checkpoint is marked as whole."""
    ended: list[str] = []

    def flush(path: Path) -> None:
        if path.is_dir():
            ended.append(path.name)
        if len(ended) == number:
            (path / lora.training.run.WHOLE).unlink()
            os.kill(os.getpid(), signal.SIGKILL)

    lora.training.run.flush = flush  # of the child only
    return quiet


def die_while_a_checkpoint_is_removed() -> Callable[..., None]:
    def remove(folder: Any, *given: Any, **named: Any) -> None:
        (Path(folder) / "trainer_state.json").unlink()
        os.kill(os.getpid(), signal.SIGKILL)

    shutil.rmtree = remove  # of the child only
    return quiet


def die_at_the_end() -> Callable[..., None]:
    """When the adapter is written, and its record, but not yet the curve."""
    lora.training.finetune.draw = lambda points, path: os.kill(os.getpid(), signal.SIGKILL)  # of the child only
    return quiet


def die_when_all_is_kept() -> Callable[..., None]:
    """When the last checkpoint is whole, and the best model not yet taken from the checkpoints."""
    transformers.Trainer._load_best_model = lambda trainer: os.kill(os.getpid(), signal.SIGKILL)  # of the child only
    return quiet


@pytest.mark.parametrize("kind", ["classification", "causal-lm"])
def test_a_killed_run_goes_on_to_the_same_weights(course: Callable[..., Course], tmp_path: Path, kind: Kind):
    """Killed at a random step, and again, while a checkpoint is written, and at the very end: the bytes are those of an
    unbroken run.
    """
    given = course(kind)
    unbroken = finetune(given, tmp_path / "unbroken", quiet)
    chance = random.Random(kind)
    first = chance.randrange(3, unbroken.outcome.planned // 2)
    killed(given, tmp_path / "broken", lambda: die_at(first))
    assert not (tmp_path / "broken").exists()
    killed(given, tmp_path / "broken", lambda: die_in_checkpoint(2))
    killed(given, tmp_path / "broken", lambda: die_at(chance.randrange(first + 3, unbroken.outcome.planned)))
    killed(given, tmp_path / "broken", die_at_the_end)
    assert not (tmp_path / "broken").exists()
    again = finetune(given, tmp_path / "broken", quiet)
    assert 0 < again.outcome.resumed <= unbroken.outcome.planned
    assert weights(tmp_path / "broken") == weights(tmp_path / "unbroken")
    assert again.scores == unbroken.scores
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "loss.png",
        "training.json",
    ]
    assert not (tmp_path / ".broken.training").exists()


@pytest.fixture
def noise(course: Callable[..., Course], tmp_path: Path) -> Course:
    """A course on which the loss gets no better, so that it stops early."""
    chance = random.Random(0)
    rows = [{"text": row["text"], "label": chance.choice("ab")} for row in GLOSSES[:40]]
    return course(
        data=save_rows(tmp_path / "noise.jsonl", rows), schedule=replace(QUICK, epochs=8, rate=0.03, patience=2)
    )


@pytest.mark.parametrize(
    "where",
    ["just before its last step", "while an old checkpoint is removed", "after its last evaluation", "at the very end"],
)
def test_a_killed_run_stops_as_early_as_an_unbroken_one(noise: Course, tmp_path: Path, where: str):
    unbroken = finetune(noise, tmp_path / "unbroken", quiet)
    steps = unbroken.outcome.steps
    assert steps < unbroken.outcome.planned
    deaths = {
        "just before its last step": lambda: die_at(steps - 1),
        "while an old checkpoint is removed": die_while_a_checkpoint_is_removed,
        "after its last evaluation": die_when_all_is_kept,
        "at the very end": die_at_the_end,
    }
    killed(noise, tmp_path / "broken", deaths[where])
    again = finetune(noise, tmp_path / "broken", quiet)
    assert 0 < again.outcome.resumed <= again.outcome.steps == steps
    assert weights(tmp_path / "broken") == weights(tmp_path / "unbroken")
    assert replace(again.outcome, resumed=0) == unbroken.outcome


def test_a_run_that_was_killed_at_its_end_within_an_epoch_takes_no_further_step(
    course: Callable[..., Course], tmp_path: Path
):
    given = course(schedule=replace(QUICK, epochs=1.5))
    unbroken = finetune(given, tmp_path / "unbroken", quiet)
    killed(given, tmp_path / "broken", die_at_the_end)
    again = finetune(given, tmp_path / "broken", quiet)
    assert replace(again.outcome, resumed=0) == unbroken.outcome
    assert weights(tmp_path / "broken") == weights(tmp_path / "unbroken")


def test_a_run_that_had_ended_finds_its_best_where_its_folder_was_moved_to(noise: Course, tmp_path: Path):
    finetune(noise, tmp_path / "unbroken", quiet)
    (tmp_path / "before").mkdir()
    killed(noise, tmp_path / "before" / "out", die_at_the_end)
    (tmp_path / "before").rename(tmp_path / "after")
    finetune(noise, tmp_path / "after" / "out", quiet)
    assert weights(tmp_path / "after" / "out") == weights(tmp_path / "unbroken")


def test_a_run_does_not_go_on_with_other_weights_of_the_base(
    course: Callable[..., Course], bases: dict[Kind, Path], tmp_path: Path
):
    base = Path(shutil.copytree(bases["classification"], tmp_path / "base"))
    killed(course(base=base), tmp_path / "out", lambda: die_at(4))
    torch.manual_seed(1)
    transformers.BertModel(transformers.BertConfig(**TINY)).save_pretrained(base)
    with pytest.raises(
        AdapterError,
        match=r"\.out\.training: holds a run with another base, other data or settings that did not end; repeat those",
    ):
        finetune(course(base=base), tmp_path / "out", quiet)


def test_a_base_without_safetensors_is_refused_before_training(
    course: Callable[..., Course], bases: dict[Kind, Path], tmp_path: Path
):
    base = Path(shutil.copytree(bases["classification"], tmp_path / "base"))
    torch.save(transformers.AutoModel.from_pretrained(base).state_dict(), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    said: list[str] = []
    with pytest.raises(
        CheckpointError,
        match=r"base: neither model\.safetensors nor model\.safetensors\.index\.json; save the base with",
    ):
        finetune(course(base=base), tmp_path / "out", lambda step, share=None, /: said.append(step))
    assert not any(step.startswith("step ") for step in said)


def test_a_folder_with_another_run_is_left_alone(course: Callable[..., Course], tmp_path: Path):
    killed(course(), tmp_path / "out", lambda: die_at(4))
    other = course(schedule=replace(QUICK, rate=1e-4))
    with pytest.raises(
        AdapterError,
        match=(
            r"\.out\.training: holds a run with another base, other data or settings that did not end; repeat those, or"
        ),
    ):
        finetune(other, tmp_path / "out", quiet)
    finetune(course(), tmp_path / "out", quiet)
    with pytest.raises(AdapterError, match="out: exists already; choose another folder, or remove it"):
        finetune(course(), tmp_path / "out", quiet)


def test_seeds_decide(course: Callable[..., Course], tmp_path: Path):
    same = [finetune(course(), tmp_path / name, quiet) for name in ("one", "two")]
    other = finetune(course(schedule=replace(QUICK, seed=1)), tmp_path / "three", quiet)
    assert weights(same[0].folder) == weights(same[1].folder) != weights(other.folder)


def test_a_real_base_learns_classes_better_than_the_commonest(
    course: Callable[..., Course], real_base: Path, tmp_path: Path
):
    given = course(count=64, base=real_base, schedule=Schedule(epochs=3, batch=8, rate=3e-3, patience=0))
    trained = finetune(given, tmp_path / "adapter", quiet)
    assert trained.metric == "accuracy"
    assert trained.scores["adapter"] > trained.scores["majority"]
    assert set(trained.scores) == {"majority", "linear probe", "adapter"}
    assert trained.labels == ("animal", "plant")
    bundle = export_task(Request(real_base, tmp_path / "adapter", "kinds", trained.labels), tmp_path / "bundle").bundle
    assert bundle.task("kinds").labels == trained.labels
    record = json.loads((tmp_path / "adapter" / "training.json").read_text())
    assert record["scores"] == trained.scores
    assert record["course"]["schedule"]["rate"] == 3e-3


def test_numbers_are_learnt(course: Callable[..., Course], real_base: Path, tmp_path: Path):
    """How long a gloss is, from its words; in hundreds of letters, as a loss of squares wants it."""
    rows = [{"text": row["text"], "letters": len(row["text"]) / 100} for row in GLOSSES[:100]]
    given = course(
        "regression",
        base=real_base,
        data=save_rows(tmp_path / "lengths.jsonl", rows),
        columns=Columns(target="letters"),
    )
    trained = finetune(
        replace(given, schedule=Schedule(epochs=2, batch=8, rate=3e-3, patience=0), longest=32),
        tmp_path / "adapter",
        quiet,
    )
    assert trained.metric == "Pearson r"
    assert trained.scores["adapter"] > 0.3


def test_text_is_learnt(course: Callable[..., Course], tmp_path: Path):
    trained = finetune(course("causal-lm"), tmp_path / "adapter", quiet)
    assert trained.metric == "loss"
    assert trained.scores["adapter"] < trained.scores["base"]
    first, *_, last = [point.validation for point in trained.outcome.points if point.validation is not None]
    assert last < first


def test_of_a_prompt_only_what_follows_is_learnt(bases: dict[Kind, Path]):
    from lora.training.examples import Examples
    from lora.training.learner import new_learner

    learner = new_learner(bases["causal-lm"], "causal-lm", (), Size(), 64, 0)
    (feature,) = learner.features(Examples(("a small wild cat is",), (" an animal",)))
    prompt = len(learner.tokenizer("a small wild cat is")["input_ids"])
    assert feature["labels"][:prompt] == [-100] * prompt
    assert feature["labels"][prompt:] == feature["input_ids"][prompt:]
    assert feature["input_ids"][-1] == learner.tokenizer.eos_token_id


@pytest.fixture
def answers_of_both(
    course: Callable[..., Course], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, Any]]:
    """What an adapter that was trained on a base answers here, and in PEFT."""
    kept: list[Any] = []
    real = lora.training.finetune.new_learner
    monkeypatch.setattr("lora.training.finetune.new_learner", lambda *given: kept.append(real(*given)) or kept[0])

    def answers(base: Path, **changes: Any) -> tuple[Any, Any]:
        finetune(course(base=base, **changes), tmp_path / "adapter", quiet)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=2, ignore_mismatched_sizes=True
        )
        theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
        ids = torch.tensor([[101, 2307, 102]])
        return kept[0].model.eval()(ids).logits.detach(), theirs(ids).logits.detach()

    return answers


def test_the_loss_of_the_base_is_that_of_an_adapter_that_learns_nothing(course: Callable[..., Course], tmp_path: Path):
    """Of texts of several lengths, in batches that are not all full."""
    others = [{"text": "a film that is", "label": " very" * count} for count in (1, 1, 2, 9, 1)]
    given = course(
        "causal-lm",
        validation=save_rows(tmp_path / "others.jsonl", others),
        schedule=replace(QUICK, epochs=0.5, rate=0),
    )
    trained = finetune(given, tmp_path / "adapter", quiet)
    assert trained.scores["base"] == trained.scores["adapter"]


@pytest.mark.parametrize("where", ["data", "validation"])
@pytest.mark.parametrize(
    "row", [{"text": "a film " * 8, "label": " is good"}, {"text": "a film " * 20, "label": " is good"}]
)
def test_a_prompt_that_leaves_no_room_for_what_follows_is_named(
    course: Callable[..., Course], tmp_path: Path, where: str, row: dict[str, Any]
):
    path = save_rows(tmp_path / "long.jsonl", [{"text": "a film", "label": " is good"}] * 12 + [row])
    with pytest.raises(
        CheckpointError,
        match=(
            r"long\.jsonl: row 13 has no token to be learnt among its first 16; shorten or remove its text, or raise"
            r" --max"
        ),
    ):
        finetune(course("causal-lm", **{where: path}), tmp_path / "adapter", quiet)


def test_the_adapter_answers_in_peft_as_it_does_here(
    answers_of_both: Callable[..., tuple[Any, Any]], bases: dict[Kind, Path]
):
    here, there = answers_of_both(bases["classification"])
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-6)


@pytest.mark.parametrize("head", ["of its own", "of three classes", "of these classes"])
@pytest.mark.parametrize("family", ["Roberta", "Electra"])
def test_a_head_of_several_layers_is_trained_and_saved_as_one(
    answers_of_both: Callable[..., tuple[Any, Any]], bases: dict[Kind, Path], tmp_path: Path, family: str, head: str
):
    """As PEFT does, which names the whole of it whatever the adapter names."""
    config = getattr(transformers, f"{family}Config")(**TINY, num_labels={"of three classes": 3}.get(head, 2))
    kind = "Model" if head == "of its own" else "ForSequenceClassification"
    torch.manual_seed(0)
    getattr(transformers, f"{family}{kind}")(config).save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(bases["classification"]).save_pretrained(tmp_path / "base")
    here, there = answers_of_both(tmp_path / "base")
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-5)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]


def test_a_target_within_the_head_is_left_to_the_head(
    answers_of_both: Callable[..., tuple[Any, Any]], bases: dict[Kind, Path], tmp_path: Path
):
    here, there = answers_of_both(bases["classification"], size=Size(targets=("query", "classifier")))
    np.testing.assert_allclose(here, there, rtol=0, atol=1e-6)
    bundle = export_task(
        Request(bases["classification"], tmp_path / "adapter", "kinds", ("animal", "plant")), tmp_path / "bundle"
    ).bundle
    assert bundle.task("kinds").labels == ("animal", "plant")


def test_training_that_gets_no_better_stops_early_and_keeps_the_best(course: Callable[..., Course], tmp_path: Path):
    trained = finetune(course(schedule=replace(QUICK, epochs=8, rate=0.3, patience=2)), tmp_path / "adapter", quiet)
    assert trained.outcome.steps < trained.outcome.planned
    losses = [point.validation for point in trained.outcome.points if point.validation is not None]
    assert trained.outcome.loss == pytest.approx(min(losses), rel=1e-5)


def test_training_that_diverges_is_an_error_and_leaves_no_adapter(course: Callable[..., Course], tmp_path: Path):
    with pytest.raises(
        AdapterError, match=r"training diverged at step \d+ \(the loss is (nan|inf)\); choose a lower --rate"
    ):
        finetune(course(schedule=replace(QUICK, rate=1e30)), tmp_path / "adapter", quiet)
    assert not (tmp_path / "adapter").exists()
    assert (
        finetune(course(), tmp_path / "adapter", quiet).outcome.resumed == 0
    )  # as it says: with a lower rate it begins anew


def test_texts_that_are_cut_are_counted(course: Callable[..., Course], tmp_path: Path):
    assert finetune(course(longest=4), tmp_path / "cut", quiet).cut > 0
    assert finetune(course(longest=500), tmp_path / "whole", quiet).cut == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"base": Path("nowhere")}, "nowhere: no config.json; give the folder of a model that transformers saved"),
        ({"size": Size(targets=("nope",))}, "target 'nope': BertForSequenceClassification has no such module"),
        ({"size": Size(rank=0)}, "rank 0: expected at least 1"),
        ({"size": Size(alpha=math.inf)}, "--alpha inf: expected a finite number"),
        ({"size": Size(dropout=math.nan)}, "--dropout nan: expected 0 or more, and less than 1"),
        ({"schedule": replace(QUICK, epochs=math.nan)}, "--epochs nan: expected a finite number above 0"),
        ({"schedule": replace(QUICK, epochs=math.inf)}, "--epochs inf: expected a finite number above 0"),
        ({"schedule": replace(QUICK, rate=math.nan)}, "--rate nan: expected a finite number, 0 or more"),
        ({"schedule": replace(QUICK, seed=-1)}, "--seed -1: expected 0 to 4294967295"),
        ({"schedule": replace(QUICK, seed=2**32)}, "--seed 4294967296: expected 0 to 4294967295"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    course: Callable[..., Course], tmp_path: Path, changes: dict[str, Any], said: str
):
    with pytest.raises(LorafuseError, match=said):
        finetune(course(**changes), tmp_path / "adapter", quiet)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", ["file/adapter", "a" * 250, "a" * 300])
def test_a_folder_that_cannot_be_made_is_an_error(course: Callable[..., Course], tmp_path: Path, name: str):
    """Of 250 letters the folder's name is short enough, but not that of the checkpoints' folder beside it."""
    (tmp_path / "file").touch()
    with pytest.raises(
        AdapterError, match=r"can't be written \(.+\); choose a folder that is yours, with room in it"
    ) as refused:
        finetune(course(), tmp_path / name, quiet)
    assert str(refused.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("full", ["_save", "_save_optimizer_and_scheduler"])
def test_a_full_disk_is_an_error_and_the_run_goes_on_when_there_is_room(
    course: Callable[..., Course], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
):
    """From the checkpoint before, whether the weights found no room or what the optimizer keeps did."""
    unbroken = finetune(course(), tmp_path / "unbroken", quiet)
    written: list[str] = []
    real = getattr(transformers.Trainer, full)

    def save(trainer: Any, folder: str, *given: Any, **named: Any) -> None:
        written.append(folder)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if len(written) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
        try:
            real(trainer, folder, *given, **named)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)

    monkeypatch.setattr(transformers.Trainer, full, save)
    with pytest.raises(
        AdapterError, match=r"adapter: can't be written \(.+\); choose a folder that is yours, with room in it"
    ):
        finetune(course(), tmp_path / "adapter", quiet)
    assert 0 < finetune(course(), tmp_path / "adapter", quiet).outcome.resumed < unbroken.outcome.planned
    assert weights(tmp_path / "adapter") == weights(tmp_path / "unbroken")


def test_a_class_that_is_held_out_whole_is_an_error(course: Callable[..., Course], tmp_path: Path):
    rows = [{"text": "a cat", "label": "animal"}, {"text": "a tree", "label": "plant"}]
    with pytest.raises(
        AdapterError,
        match=(
            r"two\.jsonl: of 2 rows, 1 are held out, and the others are all of the class '\w+'; give more examples, or"
            r" another"
        ),
    ):
        finetune(course(data=save_rows(tmp_path / "two.jsonl", rows)), tmp_path / "adapter", quiet)


def test_an_encoder_is_no_base_of_a_language_model(
    course: Callable[..., Course], bases: dict[Kind, Path], tmp_path: Path
):
    with pytest.raises(CheckpointError, match="encoder: "):
        finetune(course("causal-lm", base=bases["classification"]), tmp_path / "adapter", quiet)


def test_texts_are_cut_to_the_positions_that_a_base_has(
    course: Callable[..., Course], bases: dict[Kind, Path], tmp_path: Path
):
    """RoBERTa's begin after its padding's: 24 of 26."""
    transformers.RobertaModel(
        transformers.RobertaConfig(**TINY, max_position_embeddings=26, pad_token_id=1)
    ).save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(bases["classification"]).save_pretrained(tmp_path / "base")
    rows = [{"text": "word " * 100 + str(number), "label": number % 2} for number in range(12)]
    trained = finetune(
        course(base=tmp_path / "base", data=save_rows(tmp_path / "long.jsonl", rows), longest=128),
        tmp_path / "adapter",
        quiet,
    )
    assert (trained.longest, trained.cut) == (24, 12)


@pytest.mark.parametrize(
    "model",
    [
        transformers.T5Model(
            transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=96)
        ),
        transformers.BartModel(
            transformers.BartConfig(
                d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=96
            )
        ),
    ],
    ids=["T5", "BART"],
)
def test_an_encoder_with_a_decoder_has_no_classes(
    course: Callable[..., Course], bases: dict[Kind, Path], tmp_path: Path, model: Any
):
    model.save_pretrained(tmp_path / "base")
    transformers.AutoTokenizer.from_pretrained(bases["classification"]).save_pretrained(tmp_path / "base")
    with pytest.raises(
        CheckpointError,
        match=(
            "base: an encoder with a decoder, which has no classes or numbers here; give an encoder, or a language"
            " model"
        ),
    ):
        finetune(course(base=tmp_path / "base"), tmp_path / "adapter", quiet)


@pytest.mark.parametrize(
    ("kind", "before"),
    [
        ("classification", "multi_label_classification"),
        ("classification", "regression"),
        ("regression", "single_label_classification"),
    ],
)
def test_what_a_base_was_used_for_before_does_not_matter(
    course: Callable[..., Course], tmp_path: Path, kind: Kind, before: str
):
    given = course(kind)
    base = Path(shutil.copytree(given.base, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "problem_type": before}))
    finetune(given, tmp_path / "plain", quiet)
    finetune(replace(given, base=base), tmp_path / "adapter", quiet)
    assert weights(tmp_path / "adapter") == weights(tmp_path / "plain")


def test_a_base_without_a_tokenizer_is_refused(course: Callable[..., Course], bases: dict[Kind, Path], tmp_path: Path):
    """transformers makes one for it that knows no word."""
    base = Path(shutil.copytree(bases["classification"], tmp_path / "base"))
    for path in base.glob("*token*"):
        path.unlink()
    with pytest.raises(
        CheckpointError,
        match=(
            r"base: has no tokenizer \(one of tokenizer\.json, vocab\.txt\); save the base's own there with"
            r" save_pretrained"
        ),
    ):
        finetune(course(base=base), tmp_path / "adapter", quiet)


def test_a_tokenizer_that_cannot_fill_a_batch_is_refused(
    course: Callable[..., Course], bases: dict[Kind, Path], tmp_path: Path
):
    base = Path(shutil.copytree(bases["classification"], tmp_path / "base"))
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(base)
    with pytest.raises(
        CheckpointError,
        match="its tokenizer has neither padding nor an end of text, to fill a batch with; add one to tok",
    ):
        finetune(course(base=base), tmp_path / "adapter", quiet)


def test_one_class_is_none(course: Callable[..., Course], tmp_path: Path):
    rows = [{"text": row["text"], "label": "same"} for row in GLOSSES[:8]]
    with pytest.raises(
        AdapterError, match="all rows are of the class 'same' in column 'label'; give examples of two at least"
    ):
        finetune(course(data=save_rows(tmp_path / "one.jsonl", rows)), tmp_path / "adapter", quiet)


def test_a_base_that_is_damaged_is_named(course: Callable[..., Course], bases: dict[Kind, Path], tmp_path: Path):
    broken = Path(shutil.copytree(bases["classification"], tmp_path / "broken"))
    os.truncate(broken / "model.safetensors", 1000)
    with pytest.raises(CheckpointError, match="broken: transformers can't load it for this task"):
        finetune(course(base=broken), tmp_path / "adapter", quiet)
