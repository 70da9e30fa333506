"""Compare every kernel and public function on this device with the float64 oracle.

    cpo-kernels check                                  # every backend of the GPU, or of the CPU where there is none
    cpo-kernels check --impl cuda --only 'sizes/bfloat16*'
    cpo-kernels check --processes 8                    # Triton compiles hundreds of specialisations, most of the time

One line per group of cases: their number, the worst error as a share of its tolerance, PASS or FAIL. The cases run in
processes of their own: one that crashes or hangs is reported, and the others go on. The file at --out is rewritten
every two seconds. Exit status 1 where a case failed, or did not run before --time-limit.
"""

from pathlib import Path

from cpo_kernels.arguments import Parser

BACKENDS = ("cpu", "triton", "cuda")


def parser() -> Parser:
    made = Parser("cpo-kernels check", __doc__ or "")
    made.add_argument("--device", help="cuda, cuda:1 or cpu; default: cuda where there is a GPU")
    made.add_argument("--impl", nargs="+", choices=BACKENDS, help="backends; default: all that run on the device")
    made.add_argument("--quick", action="store_true", help="a part of the cases, in seconds")
    made.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN", help="cases by name, with * and ? as in a shell"
    )
    made.add_argument("--processes", type=int, default=1, help="cases at a time (default %(default)s)")
    made.add_argument(
        "--case-limit", type=float, default=300, metavar="SECONDS", help="a case hangs after this (default %(default)s)"
    )
    made.add_argument("--time-limit", type=float, metavar="SECONDS", help="end after this time, with what has run")
    made.add_argument("--list", action="store_true", help="print the names of the cases and stop")
    made.add_argument("--in-process", action="store_true", help="no process of their own: for debuggers and sanitizers")
    made.add_argument("--out", type=Path, metavar="FILE", help="write every case and the environment as JSON")
    return made
