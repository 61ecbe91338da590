# SPDX-License-Identifier: Apache-2.0
"""The launch scripts: what they would run and refuse; the local one for real."""

import json
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
TPU = "gcloud compute tpus tpu-vm"
# Writes its index and count into a folder, then waits for a signal or ends.
WORKER = """
import pathlib, signal, sys, time
prefix = "--config.hardware.processes."
flags = dict(a.removeprefix(prefix).split("=") for a in sys.argv[4:])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
out, mode, code = sys.argv[1:4]
path = pathlib.Path(out, flags["index"])
path.write_text(flags["count"] + " " + flags["coordinator"])
while mode == "wait":
    time.sleep(0.05)
sys.exit(int(code) if flags["index"] == "1" else 0)
"""


def run(script, *argv):
    """Returns (exit code, stdout, stderr) of a launch script."""
    command = [sys.executable] if script.endswith(".py") else []
    command += [LAUNCH / script, *argv]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_script_parses_and_explains_itself(script):
    assert subprocess.run(["bash", "-n", LAUNCH / script]).returncode == 0
    if shutil.which("shellcheck"):
        checked = subprocess.run(["shellcheck", LAUNCH / script], capture_output=True)
        assert checked.returncode == 0, checked.stdout.decode()
    code, out, err = run(script, "--help")
    assert code == 0 and f"launch/{script}" in out and "--dry-run" in out and not err


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.iterdir()))
def test_config_of_an_example_exists(script):
    for config in re.findall(r"configs/\w+\.py", (LAUNCH / script).read_text()):
        assert (ROOT / config).is_file(), config


@pytest.mark.parametrize(
    "script, argv, message",
    [
        ("local.sh", ["two", "true"], "COUNT='two' must be a number of processes"),
        ("local.sh", ["2"], "COMMAND is missing"),
        (
            "local.sh",
            ["--gpus-each", "x", "2", "true"],
            "--gpus-each=x must be a number",
        ),
        ("local.sh", ["--gpu", "2", "true"], "unknown flag --gpu"),
        ("slurm.sh", ["--nodes", "0", "true"], "--nodes=0 must be a number above 0"),
        ("slurm.sh", ["--nodes", "2"], "COMMAND is missing"),
        ("slurm.sh", ["--nodes", "2", "--time", "day", "true"], "--time=day must be"),
        ("tpu_pod.sh", ["creat", "pod"], "ACTION='creat' must be create, copy"),
        ("tpu_pod.sh", ["logs", "Pod"], "NAME='Pod' must be of a-z"),
        ("tpu_pod.sh", ["logs", "pod"], "--zone is missing"),
        ("tpu_pod.sh", ["create", "pod", "--zone", "z"], "--type is missing"),
        ("tpu_pod.sh", ["start", "pod", "--zone", "z"], "COMMAND is missing"),
    ],
)
def test_mistake_is_one_line_and_exit_code_2(script, argv, message):
    code, out, err = run(script, *argv)
    assert code == 2 and not out
    assert err.startswith(f"error: {message}") and err.count("\n") == 1


def test_local_dry_run_names_every_process():
    argv = ["--dry-run", "--gpus-each", "2", "2", "python", "-m", "x", "--a=b c"]
    code, out, _ = run("local.sh", *argv)
    lines = [shlex.split(line) for line in out.splitlines()]
    assert code == 0 and len(lines) == 2
    for i, line in enumerate(lines):
        gpus = f"CUDA_VISIBLE_DEVICES={2 * i},{2 * i + 1}"
        assert line[:6] == ["env", gpus, "python", "-m", "x", "--a=b c"]
        assert line[7:] == [
            "--config.hardware.processes.count=2",
            f"--config.hardware.processes.index={i}",
        ]
    assert lines[0][6] == lines[1][6]
    assert re.fullmatch(
        r"--config.hardware.processes.coordinator=127.0.0.1:\d+", lines[0][6]
    )


@pytest.mark.parametrize("code", [0, 3])
def test_local_ends_as_its_processes_do(tmp_path, code):
    worker = [sys.executable, "-c", WORKER, str(tmp_path), "end", str(code)]
    assert run("local.sh", "2", *worker)[0] == code
    flags = [(tmp_path / str(i)).read_text().split() for i in range(2)]
    assert flags[0] == flags[1] and flags[0][0] == "2"


def test_local_passes_sigterm_on_and_waits(tmp_path):
    worker = [sys.executable, "-c", WORKER, str(tmp_path), "wait", "0"]
    launched = subprocess.Popen([LAUNCH / "local.sh", "2", *worker])
    for _ in range(600):
        if len(list(tmp_path.iterdir())) == 2:
            break
        time.sleep(0.05)
    assert launched.poll() is None
    launched.send_signal(signal.SIGTERM)
    assert launched.wait(timeout=30) == 143


def test_slurm_script_is_a_script_and_queues_again():
    argv = ["--dry-run", "--nodes", "4", "--tasks-per-node", "8", "--partition", "gpu"]
    code, out, _ = run("slurm.sh", *argv, "python", "-m", "x", "--a=b c")
    script, _, last = out.strip().rpartition("\n\n")
    assert code == 0 and last == "sbatch < the script above"
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", script, re.MULTILINE))
    assert options["nodes"] == "4" and options["ntasks-per-node"] == "8"
    assert options["partition"] == "gpu" and options["signal"] == "TERM@120"
    srun = next(line for line in script.splitlines() if line.startswith("srun"))
    command = srun.partition(" || ")[0]
    assert shlex.split(command)[2:] == ["python", "-m", "x", "--a=b c"]
    assert 'scontrol requeue "$SLURM_JOB_ID"' in script


def test_slurm_names_no_partition_by_default():
    _, out, _ = run("slurm.sh", "--dry-run", "--nodes", "1", "true")
    assert "partition" not in out


def test_tpu_dry_run_prints_the_exact_commands():
    pod = ["pod", "--zone", "z"]
    _, created, _ = run("tpu_pod.sh", "--dry-run", "create", *pod, "--type", "v4-32")
    assert created.split() == shlex.split(
        f"{TPU} create pod --accelerator-type v4-32 --version tpu-ubuntu2204-base "
        "--zone z"
    )
    _, started, _ = run("tpu_pod.sh", "--dry-run", "start", *pod, "python", "--a=b c")
    words = shlex.split(started)
    assert words[:8] == [*TPU.split(), "ssh", "pod", "--worker=all", "--command"]
    assert "nohup setsid python --a=b\\ c" in words[8]
    assert subprocess.run(["bash", "-n"], input=words[8], text=True).returncode == 0
    argv = ["--type", "v4-32", "--spot", "python"]
    _, resumed, _ = run("tpu_pod.sh", "--dry-run", "resume", *pod, *argv)
    verbs = [re.match(rf"{TPU} (\S+)|(git)", line) for line in resumed.splitlines()]
    done = [verb[1] or verb[2] for verb in verbs]
    assert done == ["delete", "create", "git", "scp", "ssh", "ssh"]
    assert "--spot" in resumed


GKE = ["--name", "gift", "--image", "image", "--accelerator", "tpu-v5-lite-podslice"]
GKE += ["--claim", "runs", "--topology"]


@pytest.mark.parametrize(
    "topology, hosts, chips",
    [("1x1", 1, 1), ("2x2", 1, 4), ("4x4", 4, 4), ("2x2x4", 4, 4)],
)
def test_gke_writes_a_job_of_one_process_a_host(topology, hosts, chips):
    import kubernetes_validate

    argv = ["--dry-run", "--spot", *GKE, topology, "python", "-m", "x", "--a=b c"]
    code, out, _ = run("gke.py", *argv)
    manifest = json.loads(out)
    assert code == 0 and manifest["kind"] == "JobSet"
    (replicated,) = manifest["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == hosts
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["google.com/tpu"] == chips
    assert container["command"] == ["python", "-m", "x", "--a=b c"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}}
    kubernetes_validate.validate(job | {"spec": spec}, "1.30", strict=True)
    container["imagee"] = container.pop("image")  # the schema does look
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job | {"spec": spec}, "1.30", strict=True)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([*GKE, "4by4", "true"], "--topology=4by4 must be like 4x4"),
        ([*GKE, "4x4"], "COMMAND is missing"),
        (["--name", "Gift", *GKE[2:], "4x4", "true"], "--name=Gift must be of a-z"),
        (["--nam", "gift"], "the following arguments are required"),
    ],
)
def test_gke_names_a_mistake(argv, message):
    code, out, err = run("gke.py", *argv)
    assert code == 2 and not out
    assert err.startswith(f"error: {message}") and err.count("\n") == 1
