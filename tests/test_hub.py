"""Hub ids, through the real huggingface_hub against a small hub of our own on loopback."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptoss_convert.opening import hub_id
from gptoss_plugins.demo import make_checkpoint

SHA = "0123456789abcdef0123456789abcdef01234567"
REPO = "someone/tiny-gpt-oss"


class Hub(http.server.BaseHTTPRequestHandler):
    """The three answers a download needs: the file list, a file's headers, a file's bytes."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.path.startswith(f"/api/models/{REPO}"):
            names = [p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*.*")]
            if "/tree/" in self.path:
                files = [(n, (self.folder / n).stat().st_size) for n in names]
                tree = [{"type": "file", "path": n, "size": s, "oid": SHA} for n, s in files]
                return self._answer(json.dumps(tree).encode())
            info = {"id": REPO, "sha": SHA, "siblings": [{"rfilename": n} for n in names]}
            return self._answer(json.dumps({**info, "private": False, "tags": []}).encode())
        path = (
            self.folder / self.path.split("?")[0].split(f"/resolve/{SHA}/")[-1].split("/main/")[-1]
        )
        if not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if self.command == "GET":
            self.asked.append(f"{path.name} {self.headers.get('Range', '')}".strip())
        self._answer(path.read_bytes())

    def _answer(self, data: bytes) -> None:
        wanted = self.headers.get("Range")
        self.send_response(206 if wanted else 200)
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            data = data[int(first) : int(last) + 1]
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Type", "application/json")
        self.send_header("ETag", f'"{abs(hash(self.path)):x}"')
        self.send_header("X-Repo-Commit", SHA)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Iterator[tuple[str, list[str], Path]]:
    folder = tmp_path_factory.mktemp("hub") / "repo"
    make_checkpoint(folder, seed=3)
    (folder / "original").mkdir()
    (folder / "original/model.safetensors").write_bytes(b"the same weights in another form")
    handler = type("Handler", (Hub,), {"folder": folder, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", handler.asked, folder
    server.shutdown()
    server.server_close()


def run(
    home: Path, endpoint: str, *arguments: str, **more: str
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"} | more
    return subprocess.run(
        [sys.executable, "-m", "gptoss_convert", *arguments],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_plan_fetches_headers_only_then_import_fetches_the_rest_once(hub, tmp_path: Path) -> None:
    endpoint, asked, folder = hub
    for _ in range(2):  # the second time finds the small files in the cache, and no weights
        planned = run(tmp_path, endpoint, "plan", "--hf-model", REPO, "--json")
        assert planned.returncode == 0, planned.stderr
        assert json.loads(planned.stdout)["parameters"] == 6_293_072
    assert any(a.startswith("config.json") for a in asked)
    shards = [a for a in asked if a.startswith("model-")]
    assert shards
    assert all("bytes=" in a for a in shards), "only ranges of the shards"
    asked.clear()
    imported = run(
        tmp_path, endpoint, "import", "--hf-model", REPO, "--megatron-path", str(tmp_path / "m")
    )
    assert imported.returncode == 0, imported.stderr
    fetched = {a.split()[0] for a in asked}
    assert fetched >= {f"model-{n:05d}-of-00002.safetensors" for n in range(3)}
    assert not any("original" in a or a.startswith("model.safetensors ") for a in asked)
    assert (tmp_path / "m/iter_0000000/huggingface/config.json").read_bytes() == (
        (folder / "config.json").read_bytes()
    )
    run_config = (tmp_path / "m/iter_0000000/run_config.yaml").read_text()
    assert f"hf_model_id: {REPO}" in run_config
    assert str(tmp_path) not in run_config
    asked.clear()
    offline = run(tmp_path, "http://127.0.0.1:9", "plan", "--hf-model", REPO, HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr
    assert asked == []


@pytest.mark.parametrize("command", [["plan"], ["inspect"], ["import", "--megatron-path", "m"]])
def test_a_hub_that_does_not_answer_is_one_sentence(tmp_path: Path, command: list[str]) -> None:
    for more in ({"HF_HUB_OFFLINE": "1"}, {}):
        failed = run(
            tmp_path, "http://127.0.0.1:9", *command, "--hf-model", "no-one/nothing", **more
        )
        assert failed.returncode == 1
        assert failed.stderr.startswith("error: no-one/nothing: is no folder here, and the hub did")
        assert "Traceback" not in failed.stderr


def test_a_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest names a source by its id where the cache's path would tell nothing."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    assert hub_id("org/here") is hub_id(tmp_path) is hub_id("./org") is None
    assert hub_id("org/there") == "org/there"
