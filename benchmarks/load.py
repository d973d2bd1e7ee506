"""Many users at once against a one-machine system: starts one with the bundled model, and sends Locust's users to it.

    python -m benchmarks.load --users 1000 --time 60s --html out/load.html

Prints requests per second, latencies and failures; Locust writes its report beside. The exit code is 1 after a failure.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from protocol.settings import Settings, load_settings
from worker.local.state import StateFolder
from worker.local.system import LocalSystem, settings_environ

_LOCUSTFILE = Path(__file__).with_name("locustfile.py")
#: Seconds over which the users arrive.
_RAMP_S = 10
_LOOK_S = 0.5


def run(users: int, run_time: str, html: Path) -> dict[str, Any]:
    """Locust's figures in all: requests, failures and latencies in milliseconds."""
    worker = [sys.executable, "-m", "cli.main", "worker"]
    with (
        tempfile.TemporaryDirectory(prefix="millrace-load-") as folder,
        StateFolder(Path(folder)) as state,
        LocalSystem(state, load_settings(), worker, os.environ) as system,
    ):
        print("starting Redis and a worker with", system.settings.engine.model, file=sys.stderr)
        while not system.is_worker_ready:
            time.sleep(_LOOK_S)
            system.supervise(0)
        report = Path(folder) / "figures"
        locust = subprocess.Popen(_locust(users, run_time, html, report), env=_environ(system.settings))
        try:
            while locust.poll() is None:
                time.sleep(_LOOK_S)
                system.supervise(0)
        finally:
            locust.terminate()
            locust.wait()
        return figures(json.loads(report.with_suffix(".json").read_text()), users)


def figures(stats: list[dict[str, Any]], users: int) -> dict[str, Any]:
    """Of Locust's JSON, one entry for each kind of request."""
    times: dict[int, int] = {}  # requests by milliseconds, as Locust rounds them
    for entry in stats:
        for milliseconds, number in entry["response_times"].items():
            times[int(float(milliseconds))] = times.get(int(float(milliseconds)), 0) + number
    seconds = max(e["last_request_timestamp"] for e in stats) - min(e["start_time"] for e in stats) if stats else 0.0
    num_requests = sum(entry["num_requests"] for entry in stats)
    return {
        "users": users,
        "seconds": round(seconds, 1),
        "requests": num_requests,
        "failures": sum(entry["num_failures"] for entry in stats),
        "requests_s": round(num_requests / seconds, 1) if seconds else 0.0,
        **{f"p{part}_ms": percentile(times, part / 100) for part in (50, 95, 99)},
    }


def percentile(times: dict[int, int], part: float) -> int | None:
    """The time within which this part of the requests was answered; None when there were none."""
    left = part * sum(times.values())
    for milliseconds in sorted(times):
        left -= times[milliseconds]
        if left <= 0:
            return milliseconds
    return None


def _locust(users: int, run_time: str, html: Path, report: Path) -> list[str]:
    html.parent.mkdir(parents=True, exist_ok=True)
    ramp = max(1, users // _RAMP_S)
    return [
        *(sys.executable, "-m", "locust", "-f", str(_LOCUSTFILE), "--headless", "--only-summary"),
        *("--users", str(users), "--spawn-rate", str(ramp), "--run-time", run_time),
        *("--html", str(html), "--json-file", str(report)),
        # What is waited for when the time is over is no failure: its answer comes.
        *("--stop-timeout", "120", "--exit-code-on-error", "0"),
    ]


def _environ(settings: Settings) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
    return {**plain, **settings_environ(settings), "PYTHONPATH": str(_LOCUSTFILE.parent.parent)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=100, help="at the same time; default 100")
    parser.add_argument("--time", default="60s", help="how long new requests are made; default 60s")
    parser.add_argument("--html", type=Path, default=Path("out/load.html"), help="Locust's report")
    arguments = parser.parse_args()
    found = run(arguments.users, arguments.time, arguments.html)
    print(
        f"{found['requests']:,} requests by {found['users']:,} users in {found['seconds']} s: "
        f"{found['requests_s']:,} requests/s, P50 {found['p50_ms']} ms, P95 {found['p95_ms']} ms, "
        f"P99 {found['p99_ms']} ms, {found['failures']} failures; report in {arguments.html}"
    )
    print(json.dumps(found))
    return 1 if found["failures"] or not found["requests"] else 0


if __name__ == "__main__":
    sys.exit(main())
