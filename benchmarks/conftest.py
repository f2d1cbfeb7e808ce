"""Options of the suites under pytest: which level of cases is collected."""


def pytest_addoption(parser):
    parser.addoption("--level", default="quick", choices=("quick", "usual", "full"), help="cases as of sparsekit bench")
    parser.addoption("--suite", default="all", help="one suite of sparsekit bench")
