"Prepared data that are shared, against a hub on loopback"
import pytest
from huggingface_hub import constants
from tuneforge.all import *
from tests.hub import Hub
from tests.tools import serving, write_jsonl

TOK = load_tokenizer(TokenizerOptions(base_model="tiny:llama"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    class Mine(Hub): repos, log = {}, []
    with serving(Mine) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url+"/{repo_id}/resolve/{revision}/{filename}")
        def prepare(folder, token=Hub.token, where="me/prepared", offline=False):
            "As a machine with a folder and a home of its own"
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
            monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path/f"home-{folder}"))
            monkeypatch.setenv("HF_TOKEN", token)
            return prepare_data(DataOptions(datasets=[DatasetOptions(path=str(tmp_path/"a.jsonl"))], val_set_size=0.2, dataset_prepared_path=str(tmp_path/folder), push_dataset_to_hub=where), TOK)
        yield prepare, Mine


def rows(n, word="answer"): return [dict(instruction=f"question {i}", output=f"{word} {i*i}") for i in range(n)]


def content(folder):
    f, = (p for p in folder.iterdir() if p.is_dir())
    return f.name, {str(p.relative_to(f)): p.read_bytes() for p in sorted(f.rglob("*")) if p.is_file() and p.name!="manifest.json"}


def test_pushed_once_and_fetched(tmp_path, hub, caplog):
    caplog.set_level("INFO")
    prepare, Mine = hub
    write_jsonl(tmp_path/"a.jsonl", rows(60))
    prepare("one")
    (kind, name), repo = next(iter(Mine.repos.items()))
    key, files = content(tmp_path/"one")
    assert (kind, name, repo["private"])==("dataset", "me/prepared", True) and {n for n in repo["files"] if n!=".gitattributes"}=={f"{key}/{n}" for n in [*files, "manifest.json"]}
    commits = lambda: sum("/commit/" in l for l in Mine.log)
    n = commits()
    assert "found" in prepare("one").why and commits()==n # it is there
    data = prepare("two") # another machine
    assert content(tmp_path/"two")==(key, files) and "fetched prepared data from me/prepared" in caplog.text and commits()==n and len(data.train)+len(data.valid)==60
    write_jsonl(tmp_path/"a.jsonl", rows(60, "reply"))
    prepare("two", where="me") # other data, a repository of their own
    assert len(Mine.repos)==2 and any(n!="me/prepared" and n.startswith("me/") for _, n in Mine.repos)


def test_the_hub_is_no_condition(tmp_path, hub, caplog):
    prepare, Mine = hub
    write_jsonl(tmp_path/"a.jsonl", rows(60))
    for kw, says in ((dict(token="hf_wrong"), "`HF_TOKEN`"), (dict(offline=True), "cannot be reached"), (dict(where="no/good/name"), "Repo id")):
        caplog.clear()
        assert len(prepare("one", **kw).train)==48 and says in caplog.text and "the next run tries again" in caplog.text and not Mine.repos
    prepare("one")
    assert Mine.repos # and it did


def test_half_a_folder_is_not_used(tmp_path, hub, caplog):
    caplog.set_level("INFO")
    prepare, Mine = hub
    write_jsonl(tmp_path/"a.jsonl", rows(60))
    prepare("one")
    repo = next(iter(Mine.repos.values()))
    name = next(n for n in repo["files"] if n.endswith("train.npy"))
    repo["files"][name] = repo["files"][name][:-8]
    prepare("two")
    assert content(tmp_path/"two")==content(tmp_path/"one") and "fetched" not in caplog.text
