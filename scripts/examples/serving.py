"""How a Python service embeds a bundle: every task of it from one process, with numpy and ONNX Runtime only.

    python scripts/examples/serving.py BUNDLE --task movies --ids 101,2307,3185,102
    python scripts/examples/serving.py BUNDLE --task supersense --ids 1,2,3 --tokens 8 --mode resident

Prints the outputs' likeliest class, or its value for a regression; of a language model, the tokens that follow.
"""

from __future__ import annotations

import argparse

import numpy as np

import engines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--task", required=True)
    parser.add_argument(
        "--ids",
        required=True,
        type=lambda text: [int(part) for part in text.split(",")],
        help="token ids, comma-separated",
    )
    parser.add_argument("--tokens", type=int, default=0, help="how many tokens to generate")
    parser.add_argument("--mode", choices=("dedicated", "resident"), default="dedicated")
    arguments = parser.parse_args()
    with engines.open(arguments.bundle, arguments.mode) as runtime:
        labels = runtime.labels(arguments.task)
        inputs = one_row(runtime.graph(arguments.task), arguments.ids)
        with runtime.use(arguments.task) as loaded:
            if arguments.tokens:
                (tokens,) = engines.greedy(loaded, inputs, arguments.tokens)
                print(",".join(map(str, tokens)))
                return
            (row,) = loaded.run(inputs)["logits"]
        print(f"{labels[row.argmax()]} {row.max():.6f}" if labels else f"{row[0]:.6f}")


def one_row(graph: engines.Graph, ids: list[int]) -> dict[str, np.ndarray]:
    """The graph's inputs for one unpadded row of token ids."""
    row = np.array([ids], np.int64)
    known = {
        "input_ids": row,
        "attention_mask": np.ones_like(row),
        "token_type_ids": np.zeros_like(row),
        "position_ids": np.arange(len(ids))[None],
    }
    return {port.name: known[port.name] for port in graph.inputs if port.name in known} | engines.empty_cache(
        graph, rows=1
    )


if __name__ == "__main__":
    main()
