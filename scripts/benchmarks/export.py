"""Exporting against optimum-cli, side by side in one run: whole processes, from their start to their end.

    python -m scripts.benchmarks.export [FOLDER] [--runs N] [--further N] [--json]

Makes a random GPT-2 medium in float32 and two LoRA adapters of rank 4 in FOLDER (default: a temporary one, about 8 GB).
optimum-cli exports the merged checkpoint, `lorafuse export` the base and its first adapter, in alternation;
`lorafuse bundle add` then adds further tasks. Medians of seconds and of peak resident memory, the graphs' node counts,
and the targets. PEFT's merge, which optimum-cli needs first, is timed apart and not counted against it. The peer lives
in an environment of its own, made once in .cache.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from exporter.bundle.records import MODEL
from scripts.support.gpt2_medium import base_and_adapters
from scripts.support.packaged_files import CACHE

os.environ["HF_HUB_OFFLINE"] = "1"

CONSTRAINTS = Path(__file__).resolve().with_name("constraints-optimum.txt")
PEER_PACKAGES = ("optimum-onnx", "onnxruntime", "peft", "torch", "transformers")
OURS = Path(sys.executable)
PEER, FIRST, FURTHER, MERGE = (
    "optimum-cli export onnx",
    "lorafuse export (first task)",
    "lorafuse bundle add (further)",
    "PEFT merge (not counted)",
)
DYNAMO = "torch.onnx.export, defaults"

# Runs a script as its console would, and leaves the process's peak behind. A child's ru_maxrss starts at its parent's
# peak, so it may be too high but never above the parent's own: the larger of the two is right. The process's own has to
# come from VmHWM, which starts anew with its program.
LAUNCH = """
import atexit, resource, runpy, sys
report, script = sys.argv[1:3]
def leave_peak():
    own = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(max(int(own), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss), file=open(report, "w"))
atexit.register(leave_peak)
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
"""
PEFT_MERGE = """
import sys
import peft, transformers
base, adapter, merged = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(base)
peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(merged)
"""
# A prompt, then one more token on top of the cache that the prompt left.
CHECK_PEER = """
import sys
import numpy as np, onnxruntime, torch, transformers
merged, exported = sys.argv[1:]
model = transformers.AutoModelForCausalLM.from_pretrained(merged).eval()
session = onnxruntime.InferenceSession(exported + "/model.onnx", providers=["CPUExecutionProvider"])
prompt = torch.randint(0, model.config.vocab_size, (1, 12), generator=torch.Generator().manual_seed(0))
cache = transformers.DynamicCache()
heads, width = model.config.n_head, model.config.n_embd // model.config.n_head
cached = [port.name for port in session.get_inputs() if port.name.startswith("past_key_values")]
past = {name: np.zeros((1, heads, 0, width), np.float32) for name in cached}
apart = []
for ids in (prompt, prompt[:, :1]):
    start = cache.get_seq_length()
    end = start + ids.shape[1]
    positions, mask = np.arange(start, end)[None], np.ones((1, end), np.int64)
    feed = {"input_ids": ids.numpy(), "attention_mask": mask, "position_ids": positions, **past}
    feed = {port.name: feed[port.name] for port in session.get_inputs()}
    found = dict(zip((port.name for port in session.get_outputs()), session.run(None, feed)))
    with torch.no_grad():
        logits = model(input_ids=ids, past_key_values=cache).logits.numpy()
    apart.append(float(np.abs(found["logits"] - logits).max() / np.abs(logits).max()))
    past = {name: found[name.replace("past_key_values", "present")] for name in past}
print(max(apart))
"""


@dataclass(frozen=True)
class Run:
    """One whole process: wall seconds, and the peak resident memory of it or of its largest child, in MB."""

    seconds: float
    peak: float


@dataclass(frozen=True)
class Nodes:
    """The nodes of a graph, those of subgraphs included; some exporters write constants as nodes too."""

    all: int
    constants: int


@dataclass(frozen=True)
class Target:
    """What was measured beside what was aimed at."""

    what: str
    measured: float
    limit: float
    at_least: bool

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


@dataclass(frozen=True)
class Result:
    """Everything measured: runs and node counts by arm.

    ``error`` is how far optimum's graph is from torch, as a share of the largest logit.
    """

    runs: dict[str, list[Run]]
    nodes: dict[str, Nodes]
    peer_error: float


def main() -> None:
    arguments = parsed()
    folder = arguments.folder.resolve() if arguments.folder else Path(tempfile.mkdtemp(prefix="bench-export-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = measure(folder, peer_python(), arguments.runs, arguments.further)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)
    if arguments.json:
        print(json.dumps(as_json(result), indent=2))
    else:
        show(result)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", nargs="?", type=Path, help="Where the models are made and kept. Default: a temporary folder."
    )
    parser.add_argument(
        "--runs", type=int, default=3, help="Runs of optimum-cli and of the first task each. Default: 3."
    )
    parser.add_argument("--further", type=int, default=5, help="Further tasks added to the bundle. Default: 5.")
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    return parser.parse_args()


def peer_python() -> Path:
    """The Python of the peer's environment, which is made anew when its pins have changed."""
    venv = CACHE / "optimum-venv"
    stamp, want = venv / ".installed", hashlib.sha256(CONSTRAINTS.read_bytes()).hexdigest()
    python = venv / "bin" / "python"
    if not stamp.exists() or stamp.read_text() != want:
        tell("Installing optimum-onnx into .cache/optimum-venv (a few minutes) ...")
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        pip: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--constraint", CONSTRAINTS, *PEER_PACKAGES], check=True)
        stamp.write_text(want)
    return python


def measure(folder: Path, peer: Path, rounds: int, further: int) -> Result:
    base, (first, second) = base_and_adapters(folder, ("first", "second"))
    merged, exported, bundle = (fresh(folder / name) for name in ("merged", "exported", "bundle"))
    runs: dict[str, list[Run]] = {PEER: [], FIRST: [], FURTHER: [], MERGE: []}
    runs[MERGE].append(timed(MERGE, peer, [script(folder / "merge.py", PEFT_MERGE), base, first, merged]))
    export: list[str | Path] = [
        peer.with_name("optimum-cli"),
        "export",
        "onnx",
        "--model",
        merged,
        "--task",
        "text-generation-with-past",
    ]
    lorafuse = OURS.with_name("lorafuse")
    for _ in range(rounds):
        runs[PEER].append(timed(PEER, peer, [*export, fresh(exported)]))
        runs[FIRST].append(
            timed(FIRST, OURS, [lorafuse, "export", base, first, "--task", "first", "--out", fresh(bundle)])
        )
    for number in range(further):
        runs[FURTHER].append(
            timed(FURTHER, OURS, [lorafuse, "bundle", "add", bundle, second, "--task", f"further-{number}"])
        )
    error = subprocess.run(
        [peer, "-P", "-W", "ignore", "-c", CHECK_PEER, merged, exported], check=True, stdout=subprocess.PIPE, text=True
    )
    graphs = {PEER: exported / "model.onnx", FIRST: our_graph(bundle), DYNAMO: default_dynamo_graph(base, folder)}
    return Result(runs, {arm: nodes_of(path) for arm, path in graphs.items() if path is not None}, float(error.stdout))


def timed(arm: str, python: Path, command: Sequence[str | Path]) -> Run:
    """Run a Python script with its arguments by ``python``, in a process of its own.

    What it prints is shown if it fails.
    """
    with tempfile.TemporaryDirectory() as kept:
        report, log = Path(kept) / "peak", Path(kept) / "log"
        os.sync()  # or this run would wait for what the one before it left to write
        with log.open("wb") as printed:
            started = time.perf_counter()
            process = subprocess.Popen(
                [python, "-P", "-c", LAUNCH, report, *command], stdout=printed, stderr=subprocess.STDOUT, cwd=kept
            )
            status = process.wait()
            seconds = time.perf_counter() - started
        if status:
            tell(log.read_text(errors="replace")[-4000:])
            sys.exit(f"{arm}: failed with status {status}")
        run = Run(seconds, int(report.read_text()) * 1024 / 1e6)
    tell(f"{arm}: {run.seconds:.1f} s, {run.peak:.0f} MB")
    return run


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def script(path: Path, code: str) -> Path:
    path.write_text(code)
    return path


def our_graph(bundle: Path) -> Path:
    from exporter.bundle.manifest import open_bundle

    return bundle / open_bundle(bundle).task("first").parts[MODEL].model.path


def default_dynamo_graph(base: Path, folder: Path) -> Path:
    """What torch's exporter, by its defaults, makes of the same model with its cache, called as lorafuse calls it."""
    import torch
    import transformers

    from exporter.bundle.records import Head
    from exporter.graph.signature import signature

    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    called = signature(model, Head("CAUSAL_LM", model.config.vocab_size))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            called.module,
            kwargs={"inputs": called.inputs},
            input_names=list(called.inputs),
            output_names=list(called.outputs),
            dynamic_shapes={"inputs": called.axes},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    program.save(fresh(folder / "dynamo").with_suffix(".onnx"), external_data=True)
    return folder / "dynamo.onnx"


def nodes_of(path: Path) -> Nodes:
    import onnx

    operators = list(operators_of(onnx.load(path, load_external_data=False).graph))
    return Nodes(len(operators), operators.count("Constant"))


def operators_of(graph: Any) -> list[str]:
    """Every node's operator, subgraphs' after their node's."""
    found = []
    for node in graph.node:
        found.append(node.op_type)
        for attribute in node.attribute:
            for subgraph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                found += operators_of(subgraph)
    return found


def medians(runs: Mapping[str, list[Run]]) -> dict[str, Run]:
    return {
        arm: Run(statistics.median(run.seconds for run in done), statistics.median(run.peak for run in done))
        for arm, done in runs.items()
        if done
    }


def targets(result: Result) -> list[Target]:
    middle = medians(result.runs)
    found = []
    if FIRST in middle:
        found.append(
            Target(
                "first task: times quicker than the peer",
                middle[PEER].seconds / middle[FIRST].seconds,
                1.5,
                at_least=True,
            )
        )
        found.append(
            Target("first task: peer's peak / ours", middle[PEER].peak / middle[FIRST].peak, 2.5, at_least=True)
        )
    if FURTHER in middle:
        found.append(
            Target(
                "further task: times quicker than the peer",
                middle[PEER].seconds / middle[FURTHER].seconds,
                20,
                at_least=True,
            )
        )
        found.append(Target("further task: peak, MB", middle[FURTHER].peak, 700, at_least=False))
    if FIRST in result.nodes and DYNAMO in result.nodes:
        found.append(
            Target("nodes, against torch's defaults", result.nodes[FIRST].all, result.nodes[DYNAMO].all, at_least=False)
        )
    return found


def show(result: Result) -> None:
    middle = medians(result.runs)
    print(f"GPT-2 medium, float32, LoRA r = 4 on queries and values; {os.cpu_count()} CPUs; whole processes")
    print(
        f"\n{'':32}{'runs':>5}{'median s':>10}{'min':>8}{'max':>8}{'peak MB':>10}"
        f"{'peer time / this':>18}{'peer peak / this':>18}"
    )
    for arm, run in middle.items():
        seconds = [run.seconds for run in result.runs[arm]]
        figures = f"{len(seconds):5}{run.seconds:10.2f}{min(seconds):8.2f}{max(seconds):8.2f}{run.peak:10.0f}"
        print(f"{arm:32}{figures}{middle[PEER].seconds / run.seconds:18.2f}{middle[PEER].peak / run.peak:18.2f}")
    print(f"\n{'':32}{'nodes':>10}{'Constant':>10}")
    for arm, nodes in result.nodes.items():
        print(f"{arm:32}{nodes.all:10}{nodes.constants:10}")
    print(
        f"\noptimum's graph in ONNX Runtime differs from torch by {result.peer_error:.1e} of the largest logit (a"
        " prompt, then a token on its cache)"
    )
    print(f"\n{'target':48}{'measured':>10}{'aim':>12}")
    for target in targets(result):
        aim = f"{'>=' if target.at_least else '<='} {target.limit:g}"
        print(f"{target.what:48}{target.measured:10.2f}{aim:>12}  {'met' if target.met else 'MISSED'}")


def as_json(result: Result) -> dict[str, Any]:
    middle = {arm: asdict(run) for arm, run in medians(result.runs).items()}
    return {
        **asdict(result),
        "medians": middle,
        "targets": [{**asdict(target), "met": target.met} for target in targets(result)],
        "cpus": os.cpu_count(),
    }


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
