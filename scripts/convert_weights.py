"""Turn other people's weights into a folder that t2v and diffusers load: ModelScope's original checkpoint, or a folder
in diffusers' layout whose weights are pickles (.bin).

    scripts/convert_weights ORIGINAL weights/ms-1.7b
"""

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from t2v.checkpoints.convert import convert
from t2v.errors import T2VError


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/convert_weights", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IN", type=Path, help="folder with configuration.json, or model_index.json")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write; must not exist yet")
    parser.add_argument("--dtype", default="float16", choices=("float16", "float32"), help="of the written weights")
    args = parser.parse_args()
    started = time.perf_counter()
    try:
        convert(args.source, args.out, getattr(torch, args.dtype))
    except T2VError as error:
        sys.exit(str(error))
    print(f"Wrote {args.out} in {time.perf_counter() - started:.0f} s. To use it: T2V_WEIGHTS={args.out}")


if __name__ == "__main__":
    main()
