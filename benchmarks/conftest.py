"""Options of the suites under pytest: those of ``sparsekit bench``; ``-k`` is its ``--filter``."""


def pytest_addoption(parser):
    parser.addoption("--level", default="quick", choices=("quick", "usual", "full"), help="cases as of sparsekit bench")
    parser.addoption("--suite", default="all", help="one suite of sparsekit bench")
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"))
    parser.addoption("--threads", type=int, help="so many CPU threads, pinned (default: torch's, not pinned)")
    parser.addoption("--graphs", action="store_true", help="on a GPU: time replays of CUDA graphs")
    parser.addoption("--rows", help="also write the rows to this file or folder, as --json of sparsekit bench does")
