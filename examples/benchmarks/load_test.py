"""
Run `blossomrec serve` under load, kill it, restart it, and look for lost events.

    python examples/benchmarks/load_test.py --model runs/blossomrec --clients 64 --seconds 60

Each client sends one request after another: an event of its own user, every eighth time an event of a user that all clients
share, every sixteenth time a history without a user. The service is killed (`kill -9`) while requests are in progress. The
store must then have all acknowledged events, in order for each client's own user, and at most one more per request in
progress. The restarted service must use all of them. The exit status is 1 if a request failed before the kill, or an event
is missing.
"""

import argparse
import asyncio
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np

from blossomrec_hf import BlossomRecTokenizer
from blossomrec_hf.model.ids_blossomrec import NUM_SPECIAL_IDS
from blossomrec_hf.serving.event_store import Store, first_read
from blossomrec_hf.utils.command_line import HelpFormatter, exit_on_error, load_checkpoint


async def started(base: str, process: subprocess.Popen) -> None:
    """Wait until the service responds."""
    async with httpx.AsyncClient() as http:
        for _ in range(1200):
            if process.poll() is not None:
                raise SystemExit(f"The service exited with status {process.returncode} before it responded.")
            try:
                if (await http.get(f"{base}/health")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)
    raise SystemExit("The service did not respond within two minutes.")


class Load:
    """The clients, and the responses that they received."""

    def __init__(self, base: str, items: list, args: argparse.Namespace) -> None:
        self.base, self.items, self.args = base, items, args
        self.acknowledged: dict[str, list] = {f"client{i}": [] for i in range(args.clients)} | {"shared": []}
        self.milliseconds: list[float] = []
        self.errors: list[str] = []
        self.killed = False

    async def client(self, number: int) -> None:
        async with httpx.AsyncClient(base_url=self.base, timeout=60) as http:
            turn = 0
            while not self.killed:
                turn += 1
                item = random.choice(self.items)
                user = "shared" if turn % 8 == 0 else f"client{number}"
                body = {"user": user, "events": [item]}
                if turn % 16 == 1:
                    body = {"history": random.choices(self.items, k=50)}
                begin = time.perf_counter()
                try:
                    response = await http.post("/recommend", json=body)
                except httpx.TransportError as error:
                    if not self.killed:
                        self.errors.append(repr(error))
                    return
                self.milliseconds.append((time.perf_counter() - begin) * 1e3)
                if response.status_code != 200 or len(response.json()["items"]) != 10:
                    self.errors.append(f"{response.status_code} {response.text}")
                elif "user" in body:
                    self.acknowledged[user].append(item)

    async def run(self, process: subprocess.Popen) -> float:
        clients = [asyncio.create_task(self.client(i)) for i in range(self.args.clients)]
        begin = time.perf_counter()
        await asyncio.sleep(self.args.seconds)
        seconds = time.perf_counter() - begin
        self.killed = True
        process.send_signal(signal.SIGKILL)
        process.wait()
        await asyncio.gather(*clients)
        return seconds

    async def missing(self, store: Store, max_history: int) -> list[str]:
        """The users with acknowledged events that the store or the restarted service lacks."""
        lost = []
        async with httpx.AsyncClient(base_url=self.base, timeout=60) as http:
            for user, items in self.acknowledged.items():
                stored = [event.item for event in store.latest(user, -1)]
                if user == "shared":
                    complete = not Counter(items) - Counter(stored) and len(stored) <= len(items) + self.args.clients
                else:
                    complete = stored[: len(items)] == items and len(stored) <= len(items) + 1
                used = (await http.post("/recommend", json={"user": user})).json()["length"]
                wanted = len(stored) - first_read(len(stored), max_history)
                if not complete or used != wanted:
                    lost.append(f"{user}: {len(items)} acknowledged, {len(stored)} stored, {used} used")
        return lost


async def load_test(args: argparse.Namespace) -> dict[str, object]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "events.db"
    command = [sys.executable, "-m", "blossomrec_hf.commands.serve", "--model", args.model, "--store", str(path)]
    command += ["--port", str(port), "--max_history", str(args.max_history)]
    tokenizer = load_checkpoint(BlossomRecTokenizer, args.model)
    first, last = NUM_SPECIAL_IDS, len(tokenizer) - 10  # ten items must remain to be recommended
    items = tokenizer.decode_items(range(first, min(first + args.items, last)))
    process = subprocess.Popen(command)
    try:
        await started(base, process)
        load = Load(base, items, args)
        seconds = await load.run(process)
        process = subprocess.Popen(command)
        await started(base, process)
        lost = await load.missing(Store(path, read_only=True), args.max_history)
    finally:
        process.kill()
        process.wait()
        folder.cleanup()
    times = np.array(load.milliseconds)
    return {
        "clients": args.clients,
        "seconds": seconds,
        "requests": len(times),
        "requests_per_second": len(times) / seconds,
        "p50_ms": float(np.percentile(times, 50)),
        "p99_ms": float(np.percentile(times, 99)),
        "events_acknowledged": sum(map(len, load.acknowledged.values())),
        "errors": load.errors,
        "lost": lost,
    }


@exit_on_error()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a trained model with its tokenizer, or a Hub id")
    parser.add_argument("--clients", type=int, default=64, help="number of concurrent clients")
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds from the first request to the kill")
    parser.add_argument("--items", type=int, default=200, help="number of items that events are drawn from")
    parser.add_argument("--max_history", type=int, default=4096, help="passed to `blossomrec serve`")
    parser.add_argument(
        "--json", type=Path, help="JSON file to write the figures to; by default, they are only printed"
    )
    args = parser.parse_args()
    figures = asyncio.run(load_test(args))
    print(json.dumps(figures, indent=1))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    sys.exit(bool(figures["errors"] or figures["lost"]))


if __name__ == "__main__":
    main()
