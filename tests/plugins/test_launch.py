"""``launch``: golden scripts, values that arrive as they were, what is refused, and processes here."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from fake_slurm import job_of, path_with

if TYPE_CHECKING:
    from conftest import RunCli

GOLDEN = Path(__file__).parent / "launch"
EXAMPLES = Path(__file__).parents[2] / "examples"
# What no shell would leave as it is.
NASTY = [
    'He said "it\'s"  $(touch hacked) `touch hacked` $HOME',
    "two\nlines\tand a tab",
    "*",
    "",
    "\\",
    "~/x;#&|<>(){}[]!",
    "%a %% 100%",
    "é→🏖️",
    "DOS\r\nand\r'\r\n",
    "-- --prompt",
]


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CONTAINER_IMAGE", "CONTAINER_MOUNTS", "WORKSPACE", "DCLM_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)


def dry(invoke: RunCli, *words: Any) -> str:
    found = invoke("launch", "slurm", "--dry-run", *words)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "20b_pretrain",
            (
                "--time 24:00:00 --partition gpu --account me --requeue --env 'NOTE=all of it' "
                "--container-image /images/g.sqsh --container-mounts /data:/data,/lustre:/lustre "
                "-- pretrain --recipe 20b checkpoint.save=/r/20b checkpoint.load=/r/20b"
            ),
        ),
        ("120b_sft", "--time 4:00:00 -- sft --recipe 120b checkpoint.save=/r/120b"),
        ("120b_pretrain", "--gpus-per-node 4 -- pretrain --recipe 120b checkpoint.save=/r/120b"),
        (
            "import",
            "--nodes 3 --no-exclusive --cpus-per-task 4 -- import --hf-model m --megatron-path /r/m",
        ),
        ("array", "--array 0-3%2 -- import --hf-model m%a --megatron-path '/r/%%m %a'"),
    ],
)
def test_scripts_are_the_golden_ones(name: str, words: str, invoke: RunCli) -> None:
    script = dry(invoke, *shlex.split(words))
    shown = script.replace(sys.executable, "PYTHON").replace(str(Path.cwd()), "HERE")
    shown = re.sub(r"gptoss-convert [0-9.]+[^,]*,", "gptoss-convert VERSION,", shown)
    assert shown == (GOLDEN / f"{name}.sbatch").read_text()


def test_scripts_are_sound_bash(invoke: RunCli) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed")
    root = EXAMPLES.parent
    own = [*EXAMPLES.glob("*.sh"), root / "tests" / "slurm" / "cluster.sh", root / ".ci" / "run"]
    golden = sorted(GOLDEN.glob("*.sbatch"))
    assert len(own) == 8
    assert len(golden) == 5
    found = subprocess.run(
        [shellcheck, "--shell=bash", *own, *golden], capture_output=True, text=True, check=False
    )
    assert not found.returncode, found.stdout


def _run(script: str, folder: Path, **environment: str) -> list[str]:
    """What the step of a script gets, from a srun that only writes it down."""
    job = job_of(folder, 'printf "%s\\0" "$@" >"$SEEN"; env -0 >"$SEEN.env"; exit 5')
    around = {**os.environ, **job, **environment}
    data = script.encode()
    assert b"\r\n" not in data  # or sbatch refuses it
    done = subprocess.run(["bash"], input=data, cwd=folder, env=around, check=False)
    assert done.returncode == 5  # the step's
    assert not (folder / "hacked").exists()
    return Path(job["SEEN"]).read_bytes().decode().split("\0")[:-1]


def test_words_and_variables_arrive_as_they_were(invoke: RunCli, tmp_path: Path) -> None:
    prompts = [word for prompt in NASTY for word in ("--prompt", prompt)]
    variables = [word for number, v in enumerate(NASTY) for word in ("--env", f"V{number}={v}")]
    words = ["generate", "--hf-model", "m", "--ep", "4", *prompts]
    got = _run(dry(invoke, *variables, "--", *words), tmp_path)
    assert got[got.index("gptoss_convert") + 1 :] == words
    kept = (tmp_path / "seen.env").read_bytes().decode().split("\0")
    assert {f"V{number}={value}" for number, value in enumerate(NASTY)} <= set(kept)


def test_launchers_meet_at_the_first_node(invoke: RunCli, tmp_path: Path) -> None:
    script = dry(invoke, "--nodes", 2, "--", "pretrain", "--recipe", "20b")
    got = _run(script, tmp_path, NCCL_NVLS_ENABLE="1", SLURM_RESTART_COUNT="3")
    assert got[got.index("-m") + 1 : got.index("gptoss_convert")] == [
        "gptoss_plugins.launch.node",
        *("--nnodes=2", "--nproc_per_node=8", "--rdzv_id=41.3", "--rdzv_backend=c10d"),
        *("--rdzv_endpoint=node-7:10041", "-m"),
    ]
    kept = (tmp_path / "seen.env").read_bytes().decode().split("\0")
    assert {"NCCL_NVLS_ENABLE=1", "TORCH_NCCL_HIGH_PRIORITY=1"} <= set(kept)


def test_tasks_of_an_array_are_numbered(invoke: RunCli, tmp_path: Path) -> None:
    words = ["--array", "3,4", "--", "generate", "--hf-model", "m", "--prompt"]
    words.append("%a of '%%a' $x %b \"$SLURM_JOB_ID\"")
    got = _run(dry(invoke, *words), tmp_path, SLURM_ARRAY_TASK_ID="4")
    assert got[-1] == "4 of '%a' $x %b \"$SLURM_JOB_ID\""


@pytest.mark.parametrize(
    ("words", "nodes", "gpus"),
    [
        ("pretrain --recipe 20b", 2, 8),
        ("pretrain --recipe 120b", 8, 8),
        ("sft --recipe 20b", 1, 8),
        ("sft --recipe gpt_oss_120b_sft_32k_config", 6, 8),
        ("peft --recipe 20b", 1, 1),
        ("peft --recipe 120b", 1, 8),
        ("sft --recipe 20b model.pipeline_model_parallel_size=3", 3, 8),
        ("generate --hf-model m --tp 2 --ep 3", 1, 6),
        ("generate --hf-model m --tp 2 --ep 3 --pp 2", 3, 8),  # 12 ranks fill no nodes of 8, 24 do
        ("train --recipe gpt_oss_20b_sft_fp8_current_scaling_config", 1, 8),
    ],
)
def test_as_few_nodes_as_the_layout_needs(
    words: str, nodes: int, gpus: int, invoke: RunCli
) -> None:
    script = dry(invoke, "--", *words.split())
    assert f"#SBATCH --nodes={nodes}\n" in script
    assert f"#SBATCH --gpus-per-node={gpus}\n" in script


@pytest.mark.parametrize(
    ("nodes", "words", "gpus"),
    [
        (2, "sft --recipe 20b", 8),  # more than it needs: of full ones
        (1, "sft --recipe 20b model.expert_model_parallel_size=4", 4),
        (2, "generate --hf-model m --tp 2 --ep 3 --pp 2", 6),
    ],
)
def test_nodes_that_are_asked_for_are_full_unless_none_needs_to_be(
    nodes: int, words: str, gpus: int, invoke: RunCli
) -> None:
    script = dry(invoke, "--nodes", nodes, "--", *words.split())
    assert f"#SBATCH --gpus-per-node={gpus}\n" in script


def test_nodes_without_gpus_have_as_few_ranks_as_will_do(invoke: RunCli) -> None:
    script = dry(invoke, "--nodes", 2, "--gpus-per-node", 0, "--", "pretrain", "--recipe", "tiny")
    assert "--nproc_per_node=1\n" in script


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            "--nodes 3 -- pretrain --recipe 20b",
            (
                "3 nodes of 8 ranks make 24, and the layout (tp 2, pp 4, ep 4) takes 16 or a "
                "multiple of it; say --nodes 4"
            ),
        ),
        (
            "--nodes 5 --gpus-per-node 4 -- sft --recipe 120b",
            (
                "5 nodes of 4 ranks make 20, and the layout (pp 4, ep 8) takes 32 or a multiple of it; "
                "say --nodes 8"
            ),
        ),
        (
            "--nodes 3 --gpus-per-node 8 -- sft --recipe 20b",
            "say train.global_batch_size=120",
        ),
        ("--nodes 2 -- verify a b", "verify is one process; leave --nodes"),
        (
            "--nodes 2 -- data pack --input a --output b --sequence-length 7",
            "data-pack is one process",
        ),
        ("--gpus-per-node 4 --nproc-per-node 2 -- pretrain --recipe tiny", "has a GPU of its own"),
        ("-- pretrian --recipe 20b", "pretrian: there is no such command"),
        ("-- data", "data: say which of its commands"),
        (
            "-- sft --recipe 20b_pretrain",
            "20b_pretrain: is for pretrain; say pretrain in place of sft",
        ),
        ("-- pretrain --recipe 20c", "20c: there is no such recipe"),
        ("-- pretrain --recipe 20b train.iters=3", "train.iters: there is no such field"),
        ("-- pretrain --recipe 20b --nope", "No such option"),
        ("-- launch local -- train", "launch cannot be launched"),
        ("--time 1h -- verify a b", "--time 1h: is no time limit"),
        ("--time 9 --ahead 300 -- verify a b", "--time 9 is only 540; say --ahead 135"),
        ("--array a-b -- verify a b", "--array a-b: is no list of numbers"),
        ("--container-mounts a:b -- verify a b", "--container-mounts needs a container"),
        ("--env HF_TOKEN=hf_x -- verify a b", "export HF_TOKEN, and say --env HF_TOKEN"),
        ("--env NOT_SET_ANYWHERE -- verify a b", "NOT_SET_ANYWHERE: is not set here"),
        ("--env 1=2 -- verify a b", "--env 1=2: is neither NAME=VALUE nor NAME"),
        ("--sbatch 'qos\nid' -- verify a b", "--sbatch 'qos\\nid': is no NAME=VALUE of sbatch"),
        ("--sbatch '' -- verify a b", "--sbatch '': is no NAME=VALUE of sbatch"),
        ("--sbatch nodes=3 -- pretrain --recipe 20b", "launch slurm itself says sbatch's --nodes"),
        ("--sbatch 'comment=a\nb' -- verify a b", "characters that cannot stand in a script"),
        ("--name 'a\nb' -- verify a b", "characters that cannot stand in a script"),
        ("--follow --array 1 -- verify a b", "leave --json and --array out"),
        ("--nodes 2", "say after -- which command"),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence(words: str, told: str, invoke: RunCli) -> None:
    found = invoke("launch", "slurm", "--dry-run", *shlex.split(words))
    assert found.returncode == 2
    assert told in found.stderr
    assert not found.stdout


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ("-- export --megatron-path m --hf-path .", "HERE.launch"),
        ("-- export --megatron-path m --hf-path /", "/.launch"),
        ("-- pretrain --recipe tiny checkpoint.save=a/../b", "HERE/b.launch"),
        ("--name ../a/b -- verify a b", "/workspace/results/.._a_b.launch"),
        ("--name . -- verify a b", "/workspace/results/..launch"),
        ("--job-dir a -- verify a b", "HERE/a"),
    ],
)
def test_script_and_log_are_beside_the_results(words: str, folder: str, invoke: RunCli) -> None:
    script = dry(invoke, *shlex.split(words))
    assert f"#SBATCH --output={folder.replace('HERE', str(Path.cwd()))}/%j.log\n" in script


def test_a_task_of_an_array_speaks_of_itself_alone(invoke: RunCli) -> None:
    script = dry(invoke, "--array", "0-3", "--requeue", "--", "verify", "%a", "b")
    task = '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"'  # one has the whole array's number
    for command in ("scancel --signal=TERM", "scontrol show job", "scontrol requeue"):
        assert f"{command} {task}" in script
        assert f'{command} "$SLURM_JOB_ID"' not in script


def test_a_job_that_would_begin_anew_is_warned_of(invoke: RunCli) -> None:
    other = ["checkpoint.save=a", "checkpoint.load=b"]
    for options, words, warned in (
        (["--requeue"], ["checkpoint.save=a"], False),  # which checkpoint.load follows
        (["--requeue"], ["checkpoint.save=null"], True),
        (["--requeue"], other, True),
        ([], other, False),
    ):
        command = ["launch", "slurm", "--dry-run", *options, "--", "pretrain", "--recipe", "tiny"]
        found = invoke(*command, *words)
        assert found.returncode == 0
        assert ("warning: the job begins anew" in found.stderr) == warned


def test_a_container_has_the_folder_that_it_works_in(
    invoke: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--container-image", "i", "--", "verify", "a", "b"]
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    got = _run(dry(invoke, *words), tmp_path)
    here = tmp_path / "a b"
    assert {f"--container-mounts={here}:{here}", f"--container-workdir={here}"} <= set(got)
    (tmp_path / "a:b").mkdir()
    monkeypatch.chdir(tmp_path / "a:b")
    found = invoke("launch", "slurm", "--dry-run", *words)
    assert found.returncode == 2
    assert "a:b: cannot be mounted into a container" in found.stderr


@pytest.mark.parametrize(
    ("target", "mounted"),
    [("out", True), ("/b/x", True), ("/c d/x", True), ("/a/x", False), ("/bb", False)],
)
def test_results_that_go_with_the_container_are_warned_of(
    target: str, mounted: bool, invoke: RunCli
) -> None:
    options = ["--container-image", "i", "--container-mounts", "/a:/b:ro,/c d"]
    words = ["import", "--hf-model", "m", "--megatron-path", target]
    found = invoke("launch", "slurm", "--dry-run", *options, "--", *words)
    assert found.returncode == 0
    told = f"warning: {target} is in no mount of the container"
    assert (told in found.stderr) != mounted


def _sbatch(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Slurm that does this in place of taking a script."""
    monkeypatch.setenv("PATH", path_with(folder, sbatch=text, scontrol=text))


def test_what_is_no_utf8_arrives(
    invoke: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sbatch(tmp_path, "echo 7", monkeypatch)
    words = ["--job-dir", tmp_path, "--env", "A=\udcfe", "--", "verify", "\udcff", "b"]
    found = invoke("launch", "slurm", *words)
    assert found.returncode == 0, found.stderr
    script = (tmp_path / "7.sbatch").read_bytes()
    assert b"export A='\xfe'\n" in script
    assert b"    '\xff'\n" in script


def test_nothing_is_left_of_a_script_that_slurm_refuses(
    invoke: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sbatch(tmp_path, 'echo "sbatch: error: no" >&2; exit 1', monkeypatch)
    found = invoke("launch", "slurm", "--job-dir", tmp_path / "jobs", "--", "verify", "a", "b")
    assert found.returncode == 1
    assert "sbatch: error: no" in found.stderr
    assert not list((tmp_path / "jobs").iterdir())


@pytest.mark.slow
def test_jobs_launched_at_once_into_a_folder_keep_their_own_scripts(
    run_cli: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    # its number is the word that the script holds, once all have been handed in
    waits = 'touch "$2.in"; for _ in {1..99}; do (($(find . -name "*.in" | wc -l) == 3)) && break; sleep 0.2; done'
    _sbatch(tmp_path, f"cd {tmp_path}; {waits}; grep -o 'word-[0-9]*' \"$2\"", monkeypatch)
    words = [f"word-{number}" for number in (3, 5, 8)]

    def launched(word: str) -> Any:
        return run_cli("launch", "slurm", "--job-dir", tmp_path / "jobs", "--", "verify", word, "b")

    with ThreadPoolExecutor(3) as pool:
        assert [found.returncode for found in pool.map(launched, words)] == [0, 0, 0]
    for word in words:
        assert f"\n    {word}\n" in (tmp_path / "jobs" / f"{word}.sbatch").read_text()


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("7", 420), ("7:05", 425), ("3:07:05", 11225), ("2-3", 183600), ("2-3:07", 184020)],
)
def test_time_limits_are_read_as_slurm_reads_them(time: str, seconds: int) -> None:
    from gptoss_plugins.launch.request import seconds as read

    assert read(time) == seconds


def test_no_slurm_is_told_in_a_sentence(
    invoke: RunCli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("WORKSPACE", str(tmp_path))
    found = invoke("launch", "slurm", "--", "verify", "a", "b")
    assert found.returncode == 1
    assert found.stderr == (
        "error: Slurm's sbatch and scontrol cannot be found here; run this on a login node of the "
        "cluster, see the script by --dry-run, or use launch local\n"
    )
    assert not list(tmp_path.iterdir())


def test_launch_local_starts_what_the_layout_needs(invoke: RunCli) -> None:
    words = ["generate", "--hf-model", "m", "--tp", "2", "--ep", "3", "--prompt", "$(x) 'y'"]
    found = invoke("launch", "local", "--dry-run", "--", "gptoss-convert", *words)
    assert shlex.split(found.stdout) == [
        *(sys.executable, "-m", "gptoss_plugins.launch.node", "--standalone", "--nproc_per_node=6"),
        *("-m", "gptoss_convert", *words),
    ]
    refused = invoke("launch", "local", "--nproc-per-node", 7, "--", *words)
    assert refused.returncode == 2
    assert "say --nproc-per-node 6" in refused.stderr


def test_launch_local_sets_variables(run_cli: RunCli, invoke: RunCli) -> None:
    words = ["--env", "GPTOSS_CONVERT_PLUGINS=é '$x'", "--env", "HOME"]
    shown = invoke("launch", "local", *words, "--dry-run", "--", "plugins")
    assert shlex.split(shown.stdout)[:3] == ["env", words[1], sys.executable]
    refused = invoke("launch", "local", "--env", "HF_TOKEN=hf_x", "--", "plugins")
    assert refused.returncode == 2
    assert "export HF_TOKEN, and say --env HF_TOKEN" in refused.stderr
    assert "hf_x" not in refused.stderr
    few = ["--env", "GPTOSS_CONVERT_PLUGINS=gptoss", "--", "plugins", "--json"]
    found = run_cli("launch", "local", *few)
    assert {plugin["name"] for plugin in json.loads(found.stdout)["plugins"]} == {"gptoss"}


@pytest.mark.slow
def test_launch_local_shares_a_conversion(
    originals: dict[str, Path],
    imported: Path,
    tmp_path: Path,
    content: Any,
    run_cli: RunCli,
) -> None:
    words = ["import", "--hf-model", originals["bf16"], "--megatron-path", tmp_path / "m"]
    found = run_cli("launch", "local", "--nproc-per-node", 2, "--", *words)
    assert found.returncode == 0, found.stderr
    assert "imported gpt-oss" in found.stdout
    assert content(tmp_path / "m") == content(imported)
    again = run_cli(
        "launch", "local", "--nproc-per-node", 2, "--", "import", "--hf-model", "/no/where"
    )
    assert again.returncode == 2  # the command's own, not torchrun's 1, and nothing of torchrun's
    assert len(set(again.stderr.splitlines()[-1:])) == 1
    assert "Traceback" not in again.stderr


RANK = """
import os, signal, sys, time
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(True))
open(os.path.join(sys.argv[1], os.environ["RANK"]), "w").close()
while not told:
    time.sleep(0.05)
print("saved", os.environ["RANK"], flush=True)
if os.environ["RANK"] == "1":
    {end}
"""


@pytest.mark.parametrize(
    ("end", "code"), [("pass", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)]
)
def test_sigterm_is_the_ranks_own_affair(end: str, code: int, tmp_path: Path) -> None:
    import time

    (tmp_path / "rank.py").write_text(RANK.format(end=end))
    ready = tmp_path / "ready"
    ready.mkdir()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "gptoss_plugins.launch.node", "--standalone"),
            *("--nproc_per_node=2", str(tmp_path / "rank.py"), str(ready)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        end_of_patience = time.monotonic() + 60
        while len(list(ready.iterdir())) < 2 and time.monotonic() < end_of_patience:
            time.sleep(0.1)
        process.terminate()
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, err
    assert "saved 1" in out
    assert "Traceback" not in err
    assert ("rank 1 was ended by SIGKILL" in err) == (code == 137)


@pytest.mark.parametrize("code", [0, 3])
def test_sigterm_of_srun_behind_the_ranks_end_changes_no_exit_code(
    code: int, tmp_path: Path
) -> None:
    (tmp_path / "rank.py").write_text(f"raise SystemExit({code})")
    late = (  # other nodes ended a moment before, and srun ends all
        "import atexit, os, signal, sys\n"
        "from gptoss_plugins.launch.node import launch\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGTERM)\n"
        "sys.exit(launch(sys.argv[1:]))\n"
    )
    words = ["--standalone", "--nproc_per_node=2", str(tmp_path / "rank.py")]
    found = subprocess.run([sys.executable, "-c", late, *words], check=False)
    assert found.returncode == code
