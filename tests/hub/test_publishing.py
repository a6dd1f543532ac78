"""What `python -m model_card push` sends, what it refuses, and how it takes a Hub that fails."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, close_session
from safetensors.torch import save_file

import model_card.push
from model_card.push import HubError, PushArguments, check_checkpoint, push, upload
from modeling_storms import StormsForConditionalGeneration
from recipes.init_checkpoint import InitArguments, init_checkpoint

from .server import loopback_hub


ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "aValidTokenOfATest" * 2
RECORD = {
    "stage": "stage2",
    "base_model": "./stage1",
    "datasets": ["org/storms-thought-videos"],
    "steps": 12,
    "rows": 48,
    "num_processes": 1,
    "arguments": {"learning_rate": 1e-5, "latent_size": 8},
    "metrics": {"loss/lm": 0.25},
    "earlier": [{"stage": "init", "base_model": "org/base"}],
}
RESULT = {
    "benchmark": "Shell game",
    "dataset": "org/storms-thought-videos",
    "split": "test",
    "metric": "accuracy",
    "value": 0.625,
    "num_rows": 200,
    "standard_error": 0.0342,
    "protocol": "uniform32",
    "prompt": "storms",
    "latent_mode": "auto",
    "command": "python -m evaluation --model org/storms-tiny",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return init_checkpoint(InitArguments(output=str(tmp_path_factory.mktemp("tiny") / "storms-tiny"), tiny=True))


@pytest.fixture
def folder(tiny, tmp_path):
    """A trained checkpoint as training leaves it, with everything beside it that is nobody's business."""
    folder = shutil.copytree(tiny, tmp_path / "stage2")
    (folder / "training.json").write_text(json.dumps(RECORD))
    for name in ("training_args.bin", "optimizer.pt", "trainer_state.json", "_adapter/adapter_model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"\x80\x04.")
    shutil.copytree(tiny, folder / "checkpoint-12")
    return folder


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    close_session()  # one made offline stays so
    with loopback_hub() as hub:
        hub.tokens = {TOKEN}
        hub.api = HfApi(endpoint=hub.endpoint, token=TOKEN)
        yield hub
    close_session()


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Seconds that were waited, instead of waiting."""
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    return waits


def send(folder, hub, **options):
    return push(PushArguments(str(folder), "org/storms-tiny", **options), hub.api)


def save(folder, **results):
    (folder.parent / "results.json").write_text(json.dumps({"results": [{**RESULT, **results}]}))
    return str(folder.parent / "results.json")


class TestWhatIsSent:
    def test_weights_code_configs_and_card_and_nothing_else(self, folder, hub, tiny):
        assert send(folder, hub, results=[save(folder)]) == "v1"
        _, files = hub.tree("org/storms-tiny")
        assert set(files) == {path.name for path in tiny.iterdir()}
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
        package = ROOT / "modeling_storms"
        for name in files:
            if name.endswith(".py"):
                assert files[name] == (package / name).read_bytes()

    def test_the_card_states_what_was_measured_and_where_from(self, folder, hub):
        hub.create("org/base")
        hub.commits["org/base"][0][1]["README.md"] = b"---\nlicense: apache-2.0\n---\n"
        send(folder, hub, results=[save(folder)])
        card = ModelCard(hub.tree("org/storms-tiny")[1]["README.md"].decode())
        assert (card.data.base_model, card.data.license) == ("org/base", "apache-2.0")
        assert card.data.datasets == ["org/storms-thought-videos"]
        (result,) = card.data.eval_results
        assert (result.metric_value, result.dataset_type, result.metric_args["num_rows"]) == (
            0.625,
            "org/storms-thought-videos",
            200,
        )
        assert "| Shell game, accuracy | 62.5 | 3.4 |  | 200 |" in card.text
        assert RESULT["command"] in card.text

    def test_without_results_there_is_no_model_index(self, folder, hub):
        send(folder, hub)
        card = ModelCard(hub.tree("org/storms-tiny")[1]["README.md"].decode())
        assert card.data.eval_results is None
        assert card.data.license is None  # there is no base model to ask
        assert "## Results" not in card.text

    @pytest.mark.parametrize("wrong", [{"value": 62.5}, {"command": None}, {"num_rows": 0}, {"protocol": 32}])
    def test_a_number_without_its_circumstances_is_refused(self, folder, hub, wrong):
        with pytest.raises(ValueError, match=r"results.json: result 0 \('Shell game'\)"):
            send(folder, hub, results=[save(folder, **wrong)])
        assert hub.requests == []

    def test_what_an_earlier_release_had_in_excess_is_deleted(self, folder, hub):
        hub.create("org/storms-tiny")
        old = {"model-00001-of-00002.safetensors": b"x", "training_args.bin": b"x", "assets/picture.png": b"x"}
        hub.commits["org/storms-tiny"][0][1].update(old)
        send(folder, hub)
        assert set(old) & set(hub.tree("org/storms-tiny")[1]) == {"assets/picture.png"}

    def test_a_full_disk_leaves_the_card_as_it_was(self, folder, hub):
        before = (folder / "README.md").read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                send(folder, hub, dry_run=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (folder / "README.md").read_bytes() == before
        assert not list(folder.glob(".*.part"))

    def test_a_dry_run_asks_nobody(self, folder, hub):
        assert send(folder, hub, dry_run=True) == ""
        assert hub.requests == []
        assert "# storms-tiny" in (folder / "README.md").read_text()


class TestReleases:
    def test_each_has_a_tag_and_an_unchanged_one_keeps_it(self, folder, hub):
        assert [send(folder, hub), send(folder, hub)] == ["v1", "v1"]
        commits = hub.commits["org/storms-tiny"]
        assert len(commits) == 2
        (folder / "training.json").write_text(json.dumps({**RECORD, "steps": 24}))
        assert send(folder, hub) == "v2"
        assert send(folder, hub, tag="paper") == "paper"
        assert hub.tags["org/storms-tiny"] == {"v1": commits[1][0], "v2": commits[2][0], "paper": commits[2][0]}
        path = hub.api.hf_hub_download("org/storms-tiny", "training.json", revision="v1", cache_dir=folder / "_cache")
        assert json.loads(Path(path).read_text())["steps"] == 12

    def test_no_tag_is_moved(self, folder, hub):
        send(folder, hub, tag="paper")
        (folder / "training.json").write_text(json.dumps({**RECORD, "steps": 24}))
        send(folder, hub)
        with pytest.raises(ValueError, match=r"has a tag paper already.*another --tag"):
            send(folder, hub, tag="paper")

    def test_a_private_repository_is_hidden_from_strangers(self, folder, hub):
        send(folder, hub, private=True)
        assert hub.private == {"org/storms-tiny"}
        stranger = HfApi(endpoint=hub.endpoint, token=False)
        with pytest.raises(Exception, match="401"):
            stranger.repo_info("org/storms-tiny")
        assert hub.api.repo_info("org/storms-tiny").private


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "text", "complaint"),
        [
            ("latent_storms.py", "import os", "latent_storms.py is not the installed package's"),
            ("helper.py", "import os", "helper.py is not the installed package's"),
            ("training.json", '{"stage": "init", "base_model": "/home/someone/x"}', "a path of this machine, '/home/"),
            ("notes.txt", "C:\\Users\\someone\\x", "a path of this machine, 'C:"),
            ("extra.json", f'"{TOKEN}"', "extra.json holds an access token"),
            ("model.safetensors", "no weights", "model.safetensors can't be read"),
            (
                "model.safetensors.index.json",
                '{"weight_map": {"a": "other.safetensors"}}',
                "missing: other.safetensors",
            ),
            ("config.json", '{"model_type": "qwen2_5_vl"}', "model_type 'qwen2_5_vl'"),
        ],
    )
    def test_what_nobody_should_load_is_not_sent(self, folder, hub, name, text, complaint):
        (folder / name).write_text(text)
        with pytest.raises(ValueError, match="can't be published") as caught:
            send(folder, hub)
        assert complaint in str(caught.value)
        assert TOKEN not in str(caught.value)
        assert hub.requests == []

    def test_code_of_another_repository(self, folder):
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"]["AutoModel"] = "org/other--modeling_storms.StormsForConditionalGeneration"
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="code is taken from another repository"):
            check_checkpoint(folder)

    def test_a_file_above_the_hubs_limit(self, folder, monkeypatch):
        monkeypatch.setattr(model_card.push, "MAX_FILE_BYTES", 100_000)
        with pytest.raises(ValueError, match=r"model.safetensors has 0 GB, the Hub takes 0"):
            check_checkpoint(folder)

    def test_no_checkpoint_at_all(self, tmp_path):
        with pytest.raises(ValueError, match=r"holds no config.json"):
            check_checkpoint(tmp_path)

    def test_ordinary_texts_are_no_paths(self, folder):
        (folder / "notes.txt").write_text("and/or https://x.y/tmp/z a/tmp/b s3://data/home/ 1/2")
        check_checkpoint(folder)


class TestShards:
    def test_a_sharded_checkpoint_is_sent_whole(self, tiny, folder, hub):
        model = StormsForConditionalGeneration.from_pretrained(tiny)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="300KB")
        send(folder, hub)
        shards = [name for name in hub.tree("org/storms-tiny")[1] if name.endswith(".safetensors")]
        assert len(shards) > 2
        (folder / shards[0]).unlink()
        with pytest.raises(ValueError, match=f"missing: {shards[0]}"):
            send(folder, hub)

    def test_shards_hold_five_gigabytes_unless_told(self, tiny, monkeypatch, tmp_path):
        seen = {}
        base = StormsForConditionalGeneration.__mro__[2]
        monkeypatch.setattr(base, "save_pretrained", lambda self, *args, **kwargs: seen.update(kwargs))
        StormsForConditionalGeneration.from_pretrained(tiny).save_pretrained(tmp_path)
        assert seen == {"max_shard_size": "5GB"}


class TestAHubThatFails:
    @pytest.mark.parametrize("kind", [500, 503, 429, "cut", "moved"])
    @pytest.mark.parametrize("request_", ["POST .*/commit/", "PUT /lfs/", "POST .*/preupload/"])
    def test_what_passes_is_tried_again(self, folder, hub, waits, capsys, kind, request_):
        hub.fail(kind, request_, times=2)
        assert send(folder, hub) == "v1"
        _, files = hub.tree("org/storms-tiny")
        assert files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
        assert ("theirs.txt" in files) == (kind == "moved" and "commit" in request_)
        if "commit" in request_:
            assert waits[:2] == [1, 2]
            assert capsys.readouterr().out.count("Trying again in") == 2

    @pytest.mark.parametrize(
        ("kind", "meaning"),
        [(500, "the Hub has an error of its own"), (429, "too many requests"), ("cut", "the connection broke")],
    )
    def test_what_does_not_pass_is_told_and_another_run_completes(self, folder, hub, waits, kind, meaning):
        before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        hub.fail(kind, "POST .*/commit/")
        with pytest.raises(HubError, match=meaning) as caught:
            send(folder, hub)
        assert "The same command tries again" in str(caught.value)
        assert len(waits) == 5
        after = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        assert {**before, "README.md": b""} == {**after, "README.md": b""}
        hub.faults.clear()
        assert send(folder, hub) == "v1"

    def test_a_commit_whose_reply_was_lost_is_not_made_twice(self, folder, hub):
        send(folder, hub)
        (folder / "training.json").write_text(json.dumps({**RECORD, "steps": 24}))
        hub.fail("lost", "POST .*/commit/", times=1)
        assert send(folder, hub) == "v2"
        assert len(hub.commits["org/storms-tiny"]) == 3

    @pytest.mark.parametrize("request_", ["POST /api/repos/create", "POST .*/commit/", "POST .*/tag/"])
    def test_a_token_revoked_meanwhile(self, folder, hub, waits, request_, capsys):
        hub.fail("revoked", request_, times=1)
        with pytest.raises(HubError, match=r"status 401.*Log in by `hf auth login`") as caught:
            send(folder, hub)
        assert waits == []  # it would not help
        assert TOKEN not in str(caught.value) + capsys.readouterr().out
        hub.tokens = {TOKEN}
        assert send(folder, hub) == "v1"

    def test_a_file_that_vanishes(self, folder, hub):
        with pytest.raises(HubError, match="as it was"):
            upload(folder / "nowhere", "org/storms-tiny", "message", "again", api=hub.api)

    def test_mistakes_of_ours_are_not_the_hubs(self, folder, hub):
        hub.create("org/storms-tiny")
        with pytest.raises(TypeError):
            upload(folder, "org/storms-tiny", "message", "again", api=hub.api, no_such_option=True)


def test_the_command(folder, hub):
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-m", "model_card", "push", "--checkpoint", str(folder), "--repo", "org/storms-tiny"]
    command += ["--results", save(folder)]

    def run():
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    done = run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("to org/storms-tiny, tagged v1\n")
    save_file({}, folder / "extra.safetensors")
    (folder / "helper.py").write_text("")
    done = run()
    assert done.returncode == 1
    assert "Error: " in done.stderr
    assert "helper.py is not the installed package's" in done.stderr
    assert "Traceback" not in done.stderr
    for printed in (done.stdout, done.stderr):
        assert TOKEN not in printed
