"Settings for all tests: one thread, no network, a cache of their own; `--slow` adds what takes minutes"
import os, tempfile
import pytest
from hypothesis import settings

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", MPLBACKEND="agg")
os.environ.setdefault("XDG_CACHE_HOME", os.path.join(tempfile.gettempdir(), f"tuneforge-tests-{os.getuid()}"))

settings.register_profile("tuneforge", deadline=None) # no test asserts a wall time
settings.load_profile("tuneforge")


@pytest.fixture(autouse=True)
def same_environment():
    "datasets leaves a copy of `os.environ` in place after work in several processes: what a test set would stay in it"
    was = os.environ
    yield
    os.environ = was


def pytest_addoption(parser): parser.addoption("--slow", action="store_true", help="slow cells and tests, too")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"): return
    for i in items:
        if "slow" in i.keywords: i.add_marker(pytest.mark.skip(reason="slow: `make test-slow`"))
