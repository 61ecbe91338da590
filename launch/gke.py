# SPDX-License-Identifier: Apache-2.0
"""Runs a command on a TPU slice of Google Kubernetes Engine, as a JobSet.

    python launch/gke.py --name gift --image IMAGE --accelerator tpu-v5-lite-podslice \\
        --topology 4x4 --claim runs \\
        python -m gift_jax.train --config configs/sd15_object.py --workdir /runs/gift

Not yet tried on a cluster; the tests check the manifest that --dry-run prints against
Kubernetes' schema. The image has gift_jax[tpu] installed and its folder as working
directory; the volume claim, which every host mounts at /runs, holds the workdir. JAX
finds the other hosts through what GKE sets. A preempted or evicted host sends SIGTERM:
the run saves a checkpoint, the JobSet starts all hosts again, and the same command goes
on. Needs kubectl, the JobSet controller in the cluster, and Python alone here.
"""

import argparse
import json
import math
import re
import subprocess
import sys

CHIPS = 4  # of each host, in slices of more than one host
GRACE_S = 60  # from SIGTERM to SIGKILL; a checkpoint takes less
NAME = re.compile(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?")
TOPOLOGY = re.compile(r"[1-9]\d*(x[1-9]\d*){1,2}")


def manifest(args: argparse.Namespace) -> dict:
    """Returns the JobSet, of the API jobset.x-k8s.io/v1alpha2."""
    chips = math.prod(int(n) for n in args.topology.split("x"))
    hosts, chips_per_host = max(1, chips // CHIPS), min(chips, CHIPS)
    container = {
        "name": "gift",
        "image": args.image,
        "command": args.command,
        "ports": [{"containerPort": 8471}, {"containerPort": 8080}],
        "resources": {"limits": {"google.com/tpu": chips_per_host}},
        "volumeMounts": [{"name": "runs", "mountPath": "/runs"}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_S,
        "nodeSelector": {
            "cloud.google.com/gke-tpu-accelerator": args.accelerator,
            "cloud.google.com/gke-tpu-topology": args.topology,
        },
        "containers": [container],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": args.claim}}
        ],
    }
    if args.spot:
        pod["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": args.name},
        "spec": {
            "failurePolicy": {"maxRestarts": args.restarts},
            "replicatedJobs": [
                {"name": "slice", "replicas": 1, "template": {"spec": job}}
            ],
        },
    }


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        print(f"error: {message}; see launch/gke.py --help", file=sys.stderr)
        sys.exit(2)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Returns the checked flags; a mistake ends with one line and exit code 2."""
    flags = _Parser(
        prog="launch/gke.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flags.add_argument("--dry-run", action="store_true", help="print the manifest only")
    flags.add_argument("--name", required=True)
    flags.add_argument("--image", required=True)
    flags.add_argument("--accelerator", required=True, help="as GKE calls it")
    flags.add_argument("--topology", required=True, help="such as 4x4 or 2x2x4")
    flags.add_argument("--claim", required=True, help="volume claim with the workdir")
    flags.add_argument("--spot", action="store_true", help="machines that may go away")
    flags.add_argument("--restarts", type=int, default=100, help="(default 100)")
    flags.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND...")
    args = flags.parse_args(argv)
    if not NAME.fullmatch(args.name):
        flags.error(f"--name={args.name} must be of a-z, 0-9 and -, at most 40")
    if not TOPOLOGY.fullmatch(args.topology):
        flags.error(f"--topology={args.topology} must be like 4x4 or 2x2x4")
    if args.restarts < 0:
        flags.error(f"--restarts={args.restarts} must be at least 0")
    if not args.command:
        flags.error("COMMAND is missing")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    text = json.dumps(manifest(args), indent=2)
    if args.dry_run:
        print(text)
        return 0
    done = subprocess.run(["kubectl", "apply", "-f", "-"], input=text, text=True)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
