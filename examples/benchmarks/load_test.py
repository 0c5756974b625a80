"""
Puts `blossomrec serve` under load, kills it in the middle, starts it again, and looks for lost events.

    python examples/benchmarks/load_test.py --model runs/blossomrec --clients 64 --seconds 60

Every client sends requests one after the other: an event of its own user, every eighth time one of a user shared by all
clients, every sixteenth time a history without a user. While requests are still under way the service gets `kill -9`. The
store must then hold, in order, every event of a client's own user that was acknowledged (and at most the one that was
under way), and all acknowledged events of the shared user; the restarted service must know all of them. The exit status
is 1 where a request failed before the kill, or an event is missing.
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
from blossomrec_hf.serving.event_store import Store, first_read
from blossomrec_hf.utils.command_line import HelpFormatter, exit_on_error, load_checkpoint


async def started(base: str, process: subprocess.Popen) -> None:
    """Waits until the service answers."""
    async with httpx.AsyncClient() as http:
        for _ in range(1200):
            if process.poll() is not None:
                raise SystemExit(f"The service ended with status {process.returncode} before it answered.")
            try:
                if (await http.get(f"{base}/health")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)
    raise SystemExit("The service did not answer within two minutes.")


class Load:
    """The clients, and what they were told."""

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
        """What the store, or the service that was started again, lacks of what was acknowledged."""
        lost = []
        async with httpx.AsyncClient(base_url=self.base, timeout=60) as http:
            for user, items in self.acknowledged.items():
                stored = store.latest(user, -1)
                if user == "shared":
                    complete = not Counter(items) - Counter(stored) and len(stored) <= len(items) + self.args.clients
                else:
                    complete = stored[: len(items)] == items and len(stored) <= len(items) + 1
                known = (await http.post("/recommend", json={"user": user})).json()["length"]
                wanted = len(stored) - first_read(len(stored), max_history)
                if not complete or known != wanted:
                    lost.append(f"{user}: {len(items)} acknowledged, {len(stored)} stored, {known} known")
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
    items = tokenizer.decode_items(range(2, min(2 + args.items, len(tokenizer) - 10)))
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
    parser.add_argument("--clients", type=int, default=64, help="clients that send requests at the same time")
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds from the first request to the kill")
    parser.add_argument("--items", type=int, default=200, help="how many items the events are drawn from")
    parser.add_argument("--max_history", type=int, default=4096, help="that of `blossomrec serve`")
    parser.add_argument("--json", type=Path, help="file for the figures; by default, they are printed only")
    args = parser.parse_args()
    figures = asyncio.run(load_test(args))
    print(json.dumps(figures, indent=1))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    sys.exit(bool(figures["errors"] or figures["lost"]))


if __name__ == "__main__":
    main()
