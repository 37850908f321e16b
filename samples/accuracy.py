"""How many tokens can go before accuracy does: the digits model with each recipe at several schedules.

Run `make demo` first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import tokenopt
from train_digits import digits

# On 64 patches and 6 layers. The recipes remove in different places, so compare at equal FLOPs, not at equal rows.
SETTINGS = [
    ("tome", {"r": 0}),
    *(("tome", {"r": r}) for r in (4, 8, 10)),
    *(("random", {"r": r}) for r in (4, 8, 10)),
    *(("evit", {"keep": keep, "layers": [1, 2, 3]}) for keep in (0.8, 0.6, 0.4)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("samples/out/digits.pt"))
    options = parser.parse_args()

    _, images, _, labels = digits()
    dense = tokenopt.load(options.model)
    for recipe, schedule in SETTINGS:
        result = tokenopt.optimize(dense, recipe=recipe, schedule=schedule)
        accuracy = (result.program(images).argmax(1) == labels).float().mean().item()
        flops = result.report.flops
        saved = flops["before"] / flops["after"]
        print(f"{recipe:<7} {str(tokenopt.Schedule.parse(schedule)):<15} {saved:5.2f}x fewer FLOPs   {accuracy:.1%}")


if __name__ == "__main__":
    main()
