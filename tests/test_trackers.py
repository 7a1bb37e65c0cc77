"Trackers have the figures that run.json has, cost no run, and hold no secrets"
import json, os, struct, time, zipfile
from http.server import BaseHTTPRequestHandler
from pathlib import Path
import pytest
from transformers import TrainerState
from tuneforge.all import *
from tuneforge.trackers import BRIEF, QUIET, Tracker, brief
from tests.tools import serving, write_jsonl

FIGURES = ("loss", "grad_norm", "learning_rate", "eval_loss")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    village = Village()
    return write_jsonl(tmp_path_factory.mktemp("data")/"train.jsonl", village.questions(list(village.people)[:3]))


@pytest.fixture(autouse=True)
def nobody(tmp_path, monkeypatch):
    "A machine without keys"
    for k in [k for k in os.environ if k.startswith(("WANDB_", "COMET_", "MLFLOW_"))]: monkeypatch.delenv(k)
    for k, v in (QUIET | BRIEF).items(): monkeypatch.setenv(k, v) # gone afterwards
    monkeypatch.setenv("NETRC", str(tmp_path/"none"))
    monkeypatch.setenv("HOME", str(tmp_path))


def config(data, out, **kw):
    base = dict(base_model="tiny:llama?num_hidden_layers=1", datasets=[dict(path=str(data), type="alpaca")], dataset_prepared_path=str(data.parent/"prepared"), output_dir=str(out),
        sequence_len=128, learning_rate=1e-3, save_strategy="no", logging_steps=1, micro_batch_size=8, max_steps=3, val_set_size=0.1, warmup_steps=0)
    return load_config(base | kw)


def expected(out):
    "{name: {step: value}} as run.json has it"
    history = json.loads((out/"run.json").read_text())["history"]
    found = {(f"eval/{k[5:]}" if k.startswith("eval_") else f"train/{k}"): {h["step"]: h[k] for h in history if k in h} for k in FIGURES}
    assert len(found["train/loss"])>=3 and found["eval/loss"]
    return found


def close(got, want):
    assert got.keys()==want.keys()
    for k in want: assert got[k]==pytest.approx(want[k], rel=1e-6), k


def test_tensorboard(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    train(config(data, tmp_path, use_tensorboard=True))
    acc, want = EventAccumulator(str(tmp_path/"tensorboard")).Reload(), expected(tmp_path)
    close({k: {e.step: e.value for e in acc.Scalars(k)} for k in want}, want)


def records(file):
    "Records of a .wandb file: LevelDB's log format after seven bytes, in blocks of 32 KiB"
    data, at, part = file.read_bytes(), 7, b""
    while at+7<=len(data):
        if 32768-at%32768<7: at += 32768-at%32768
        n, kind = struct.unpack("<HB", data[at+4:at+7])
        part += data[at+7:at+7+n]
        at += 7+n
        if kind in (1, 4): # whole, or its last part
            yield part
            part = b""


def wandb_rows(folder):
    "What the files of offline runs hold: (ids, config, rows of figures)"
    from wandb.proto import wandb_internal_pb2
    ids, config, rows = [], {}, []
    for f in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in records(f):
            r = wandb_internal_pb2.Record()
            r.ParseFromString(data)
            if r.run.run_id and r.run.run_id not in ids: ids.append(r.run.run_id)
            config |= {u.key: json.loads(u.value_json) for u in r.run.config.update}
            if r.history.item: rows.append({(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in r.history.item})
    return ids, config, rows


def test_wandb(data, tmp_path):
    pytest.importorskip("wandb")
    kw = dict(wandb_project="p", wandb_mode="offline", save_strategy="steps", save_steps=2, wandb_run_id="mine", wandb_watch="gradients", wandb_log_model="end")
    train(config(data, tmp_path, **kw))
    ids, cfg, rows = wandb_rows(tmp_path)
    assert ids==["mine"] and cfg["learning_rate"]==1e-3
    close({k: {r["train/global_step"]: r[k] for r in rows if k in r} for k in expected(tmp_path)}, expected(tmp_path))


def test_wandb_goes_on_as_the_same_run(data, tmp_path):
    "The id that it was given the first time is in the checkpoint"
    pytest.importorskip("wandb")
    kw = dict(wandb_project="p", wandb_mode="offline", save_strategy="steps", save_steps=2)
    train(config(data, tmp_path/"a", **kw))
    train(config(data, tmp_path/"b", resume=str(tmp_path/"a"/"checkpoint-2"), **kw))
    first, second = wandb_rows(tmp_path/"a"), wandb_rows(tmp_path/"b")
    assert len(first[0])==1 and first[0]==second[0]
    assert [r["train/global_step"] for r in second[2] if "train/loss" in r]==[3]


@pytest.mark.parametrize("place", ["folder", pytest.param("sqlite", marks=pytest.mark.slow)])
def test_mlflow(data, tmp_path, place):
    pytest.importorskip("mlflow")
    if place=="sqlite": pytest.importorskip("sqlalchemy"), pytest.importorskip("alembic")
    from mlflow import MlflowClient
    uri = str(tmp_path/"mlruns") if place=="folder" else f"sqlite:///{tmp_path}/m.db"
    kw = dict(mlflow_experiment_name="e", mlflow_run_name="r", mlflow_tracking_uri=uri, save_strategy="steps", save_steps=2)
    train(config(data, tmp_path/"out", hf_mlflow_log_artifacts=place=="folder", **kw))
    client = MlflowClient(tracking_uri=uri)
    found = lambda: client.search_runs([client.get_experiment_by_name("e").experiment_id])
    r, = found()
    want = expected(tmp_path/"out")
    close({k: {m.step: m.value for m in client.get_metric_history(r.info.run_id, k)} for k in want}, want)
    assert (r.info.run_name, r.info.status, r.data.params["learning_rate"])==("r", "FINISHED", "0.001")
    if place=="folder": assert "checkpoint-2" in [a.path for a in client.list_artifacts(r.info.run_id)]
    train(config(data, tmp_path/"b", resume=str(tmp_path/"out"/"checkpoint-2"), **kw))
    assert [o.info.run_id for o in found()]==[r.info.run_id]


def test_mlflow_by_default_keeps_the_run_in_its_folder(data, tmp_path, monkeypatch, capfd, caplog):
    "Nothing in the working folder; a run that goes on is one run, also where only its checkpoint and the store are left; one in another folder is new"
    pytest.importorskip("mlflow"), pytest.importorskip("sqlalchemy"), pytest.importorskip("alembic")
    from mlflow import MlflowClient
    (tmp_path/"cwd").mkdir()
    monkeypatch.chdir(tmp_path/"cwd")
    caplog.set_level("INFO", logger="tuneforge")
    kw = dict(use_mlflow=True, hf_mlflow_log_artifacts=True, save_strategy="steps", save_steps=2)
    train(config(data, "../out", **kw))
    uri = f"sqlite:///{tmp_path}/out/mlflow/mlflow.db"
    assert f"`mlflow ui --backend-store-uri {uri}` shows the run" in caplog.text and not list((tmp_path/"cwd").iterdir())
    def found(uri):
        client = MlflowClient(tracking_uri=uri)
        return client, client.search_runs([client.get_experiment_by_name("tuneforge").experiment_id])
    client, (r,) = found(uri)
    want = expected(tmp_path/"out")
    close({k: {m.step: m.value for m in client.get_metric_history(r.info.run_id, k)} for k in want}, want)
    assert (tmp_path/"out"/"mlflow"/"files"/r.info.run_id/"artifacts"/"checkpoint-2"/"trainer_state.json").is_file()
    train(config(data, "../out", resume="../out/checkpoint-2", **kw))
    assert [o.info.run_id for o in found(uri)[1]]==[r.info.run_id]
    train(config(data, "../b", resume="../out/checkpoint-2", **kw))
    new, = found(f"sqlite:///{tmp_path}/b/mlflow/mlflow.db")[1]
    assert new.info.run_id!=r.info.run_id and new.info.status=="FINISHED" and "is off" not in caplog.text
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/team.db")
    train(config(data, "../c", use_mlflow=True))
    assert not (tmp_path/"c"/"mlflow").exists() and len(MlflowClient().search_runs(["0"]))==1
    assert "INFO mlflow" not in capfd.readouterr().err and not list((tmp_path/"cwd").iterdir())


def test_a_database_needs_its_packages(data, tmp_path, monkeypatch):
    from importlib.util import find_spec
    monkeypatch.setattr("tuneforge.trackers.find_spec", lambda n: None if n=="alembic" else find_spec(n) or True)
    with pytest.raises(UserError, match=r"MLflow needs alembic, not installed here: pip install 'tuneforge\[mlflow\]'"): check_trackers(config(data, tmp_path, use_mlflow=True))
    check_trackers(config(data, tmp_path, use_mlflow=True, mlflow_tracking_uri="http://127.0.0.1:9"))


def test_wandb_says_where_the_run_is_and_no_more(data, tmp_path, capfd, caplog):
    pytest.importorskip("wandb")
    caplog.set_level("INFO", logger="tuneforge")
    train(config(data, tmp_path, wandb_project="p", wandb_mode="offline"))
    said, (folder,) = capfd.readouterr().err, (tmp_path/"wandb").glob("offline-run-*")
    assert "Run history" not in said and "Run summary" not in said and said.count("wandb: ")<6
    assert f"Weights & Biases: `wandb sync {folder}` sends the run" in caplog.text


def test_comet(data, tmp_path):
    pytest.importorskip("comet_ml")
    train(config(data, tmp_path, comet_project_name="p", comet_online=False, comet_api_key="sesame"))
    file, = (tmp_path/"comet").glob("*.zip")
    with zipfile.ZipFile(file) as z:
        text = z.read("messages.json").decode()
        found = [json.loads(l) for l in text.splitlines()]
    want, got = expected(tmp_path), {}
    for m in [m["payload"] for m in found if m["type"]=="metric_msg"]:
        if m["metric"]["metricName"] in want: got.setdefault(m["metric"]["metricName"], {})[m["metric"]["step"]] = float(m["metric"]["metricValue"])
    close(got, want)
    assert "sesame" not in text and "sesame" not in (tmp_path/"run.json").read_text()


@pytest.mark.parametrize("kw, says", [(dict(wandb_project="p"), "wandb_mode: offline"), (dict(comet_project_name="p"), "comet_online: false")])
def test_no_key_is_said_before_the_model_is_loaded(data, tmp_path, kw, says):
    pytest.importorskip("wandb"), pytest.importorskip("comet_ml")
    with pytest.raises(UserError, match=says): train(config(data, tmp_path/"out", **kw))
    assert not (tmp_path/"out").exists()


def test_no_package_is_said_before_the_model_is_loaded(data, tmp_path, monkeypatch):
    monkeypatch.setattr("tuneforge.trackers.find_spec", lambda n: None)
    with pytest.raises(UserError, match=r"tuneforge\[tensorboard\]"): train(config(data, tmp_path/"out", use_tensorboard=True))
    assert not (tmp_path/"out").exists()


def test_a_tracker_that_fails_costs_no_run(data, tmp_path, caplog):
    "A file where TensorBoard wants its folder"
    pytest.importorskip("tensorboard")
    (tmp_path/"tensorboard").write_text("in the way")
    r = train(config(data, tmp_path, use_tensorboard=True))
    assert r.metrics["steps"]==3 and caplog.text.count("TensorBoard is off")==1


class Talks(Tracker):
    "A library whose error repeats what it was called with"
    title, errors = "Talks", (RuntimeError,)
    def begin(self, model, args):
        o = self.opts
        raise RuntimeError(f"API request to {o.mlflow_tracking_uri}api?sig=QUERYPW failed for postgresql://u:MORE@PW@db/x: {o.comet_api_key.get_secret_value()}, {o.comet_experiment_config}, {os.environ['MLFLOW_TRACKING_PASSWORD']}")


@pytest.mark.parametrize("password, seen", [("SECRETPW", "SECRETPW"), ("SEC/RET@PW", "RET"), ("SECRET%40PW", "SECRET")])
def test_a_message_holds_no_secrets(password, seen, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "ENVPW")
    cfg = Config(base_model="x", learning_rate=1, datasets=[dict(path="y")], use_mlflow=True, mlflow_tracking_uri=f"http://u:{password}@127.0.0.1:9/", comet_api_key="KEYPW", use_comet=True, comet_experiment_config=dict(api_key="NESTEDPW"))
    t = Talks(cfg, {}, "out")
    t.on_train_begin(None, TrainerState(), None)
    assert "http://127.0.0.1:9/api failed for postgresql://db/x" in caplog.text and "RuntimeError" in caplog.text and not t.on
    assert "PW" not in caplog.text and seen not in caplog.text


def test_an_unreachable_mlflow_is_asked_thrice_and_told_no_password(data, tmp_path, monkeypatch, caplog):
    "In all, by a run of several steps; each time for so long as the environment says"
    pytest.importorskip("mlflow")
    for k in BRIEF: monkeypatch.delenv(k)
    asked = []
    class Busy(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, {k: os.environ.get(k) for k in BRIEF}))
            self.send_error(503)
        do_POST = do_GET
        def log_message(self, *args): pass
    with serving(Busy) as url: r = train(config(data, tmp_path, use_mlflow=True, mlflow_tracking_uri=url.replace("//", "//u:SECRETPW@")))
    assert r.metrics["steps"]==3 and "MLflow is off" in caplog.text and "SECRETPW" not in caplog.text
    assert len(asked)==1+int(BRIEF["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]) and len({p for p, _ in asked})==1 and all(told==BRIEF for _, told in asked)
    assert not any(k in os.environ for k in BRIEF)


def test_short_waits_unless_the_user_says_otherwise(data, tmp_path, monkeypatch):
    for k in BRIEF: monkeypatch.delenv(k)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "6")
    asked = lambda **kw: config(data, tmp_path, mlflow_experiment_name="e", mlflow_tracking_uri="x", **kw)
    with brief(asked()): assert {k: os.environ[k] for k in BRIEF}==BRIEF | dict(MLFLOW_HTTP_REQUEST_MAX_RETRIES="6")
    assert [k for k in BRIEF if k in os.environ]==["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]
    with brief(asked(hf_mlflow_log_artifacts=True)): assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]=="6" and "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ # a server takes its time over a checkpoint, in a second run of a process, too


def test_short_waits_are_variables_that_the_libraries_know():
    pytest.importorskip("mlflow"), pytest.importorskip("comet_ml")
    from mlflow import environment_variables
    from comet_ml.config import get_config
    for k in BRIEF: assert hasattr(environment_variables, k) if k.startswith("MLFLOW") else get_config(k.lower().replace("_", ".", 1).replace("session_", "session.").replace("experiment_", "experiment.")) is not None, k


def test_waiting_for_a_server_is_no_training():
    "Nor is anything else that begins with the run"
    live, state = LiveProgress(Meter(lambda step: step*1000)), TrainerState(max_steps=2)
    live.on_train_begin(None, state, None)
    time.sleep(0.5)
    live.on_step_begin(None, state, None)
    live.on_train_end(None, state, None)
    assert live.meter.rate(1)>1000/0.4
