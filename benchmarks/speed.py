"""Is a layer saved time saved? Every sentence that was asked of the engines, measured.

    python benchmarks/speed.py PART ... [--threads 4] [--sst2 FOLDER] [--uspto FOLDER]
    python benchmarks/speed.py page

Parts, or `all` of them:

- share: the realised share of the ideal at mean exit depths of 25, 50 and 75 %
- full: at full depth, each engine beside the same runtime without offramp
- profile: microseconds that exits, policy and compaction add to a layer, and each stage of a run
- pool: rows of all depths in one batch of an ALBERT
- padding: SST-2 in our order beside batches as rows arrive
- int8: early exit in int8 beside plain ONNX Runtime in int8        (--sst2, --uspto)
- pabee: SST-2 dev beside a loop as the original's                  (--sst2)
- file: the exported file beside the engines                        (--sst2, --uspto)
- determinism: bits that depend on neighbours; what is made anew    (--sst2, --uspto)

FOLDER is a model that `offramp train` made for SST-2 (MiniLM) or uspto_50k (rxn-albert). Contenders
take turns batch by batch; a figure is the median over passes with its 95 % interval. Each cell
goes to docs/results/speed/<part>-<threads>.json as it is done, and is not measured again without
--again. `page` makes docs/results/speed.md of what lies there.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import speed_bits
import speed_layers
import speed_texts
import torch
from speed_page import write_page
from speed_study import Cells, Options, run_part

OUT = Path(__file__).parents[1] / "docs" / "results" / "speed"
PARTS = {
    "share": speed_layers.share,
    "full": speed_layers.full,
    "profile": speed_layers.profile,
    "pool": speed_layers.pool,
    "padding": speed_texts.padding,
    "int8": speed_texts.int8,
    "pabee": speed_texts.pabee,
    "file": speed_bits.file,
    "determinism": speed_bits.determinism,
}


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=[*PARTS, "all", "page"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/speed"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1.0, help="of timing, for a cell")
    parser.add_argument("--processes", type=int, default=1, help="for each cell: 1, or 6 or more")
    parser.add_argument("--only", default="", help="cells whose name has this in it")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--list", action="store_true", help="name the cells and stop")
    parser.add_argument("--quick", action="store_true", help="does it run; into <work>/quick")
    for name in ("sst2", "uspto"):
        parser.add_argument(f"--{name}", type=Path, help="a trained model")
        parser.add_argument(f"--{name}-tune", type=Path, help="rows to choose points on")
    return parser


def _given(given: argparse.Namespace) -> Options:
    pairs = (("sst2", given.sst2, given.sst2_tune), ("uspto_50k", given.uspto, given.uspto_tune))
    return Options(
        threads=given.threads,
        quick=given.quick,
        minutes=given.minutes,
        processes=given.processes,
        work=given.work / "quick" if given.quick else given.work,
        folders={name: folder for name, folder, _ in pairs if folder},
        tune={name: rows for name, _, rows in pairs if rows},
    )


def main() -> None:
    parser = _arguments()
    given = parser.parse_args()
    if given.processes != 1 and given.processes < 6:
        parser.error(
            "--processes: of fewer than 6, no order gives an interval of 95 %. Give 1, or 6."
        )
    logging.getLogger("offramp").setLevel(logging.ERROR)
    options = _given(given)
    out = given.out or (options.work / "speed" if given.quick else OUT)
    torch.set_num_threads(options.threads)
    for name in PARTS if "all" in given.parts else given.parts:
        if name == "page":
            continue
        cells: Cells = PARTS[name](options)
        if given.list:
            print(*(f"{name}: {cell}" for cell in cells), sep="\n")
        else:
            run_part(name, cells, out, options, given.again, given.only)
    if "page" in given.parts:
        # cells are named by the folders that they would read, which need not be there for that
        named = replace(options, folders={"sst2": Path("sst2"), "uspto_50k": Path("uspto_50k")})
        planned = {name: tuple(cells(named)) for name, cells in PARTS.items()}
        write_page(out, out.with_suffix(".md"), planned)


if __name__ == "__main__":
    main()
