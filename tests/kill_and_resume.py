"""Kill a training run with SIGKILL at random points, resume it, and compare what it ends with bit by bit.

    python tests/kill_and_resume.py --points 100 --processes 1
    python tests/kill_and_resume.py --points 100 --processes 2

A point is a step, and a random part of the time of a step behind it, so that steps, evaluations and writing are hit. Of two
processes one or both are killed; one that is left must end by itself. Every fourth point kills the resumed run as well.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

TIMES = {"images_per_s", "data_wait_share", "epoch_s", "total_s"}
COMPARED = ("model", "ema", "optimizer", "epoch", "iteration", "best", "random", "ranks", "loader", "sums", "rank_sums")
EPOCHS, STEPS = 3, 3  # STEPS in an epoch
PATIENCE = 120.0  # seconds for whatever must end by itself


class Telling:
    """A reporter that sends the number of each step."""

    def __init__(self, pipe):
        self.pipe = pipe

    def message(self, text):
        pass

    def begin_epoch(self, epoch, epochs, batches, done):
        self.epoch = epoch

    def step(self, done, loss, accuracy, images_per_s, data_wait):
        self.pipe.send((self.epoch - 1) * STEPS + done)

    def end_epoch(self, row, epochs, best):
        pass

    def close(self):
        pass


def work(rank, processes, port, out, save_every, sync_bn, pipe):
    """One process of a run."""
    import torch

    from fastres.errors import RankError
    from fastres.train import Settings, train

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries say of a connection that broke
    if processes > 1:
        os.environ.update(
            RANK=str(rank),
            WORLD_SIZE=str(processes),
            LOCAL_RANK=str(rank),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    torch.set_num_threads(1)
    settings = Settings(
        "resnet20", out=out, epochs=EPOCHS, batch_size=32, image_size=16, limit=32 * STEPS, lr=0.05, ema=0.9, mixup=0.2,
        deterministic=True, threads=1, save_every=save_every, keep=2, device="cpu", sync_bn=sync_bn,
    )  # fmt: skip
    try:
        train(settings, Telling(pipe))
    except RankError:
        os._exit(3)


class Attempt:
    """The processes of one start of a run."""

    def __init__(self, context, processes, out, save_every, sync_bn=False):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipe, theirs = context.Pipe(duplex=False)
        self.members = [
            context.Process(target=work, args=(rank, processes, port, str(out), save_every, sync_bn, theirs))
            for rank in range(processes)
        ]
        for member in self.members:
            member.start()
        theirs.close()

    def kill_at(self, step, delay, victims):
        """SIGKILL ``victims`` some time after a step, and wait for the others to end; False if the run ended before."""
        try:
            while self.pipe.poll(PATIENCE):
                if self.pipe.recv() >= step:
                    break
        except EOFError:
            return False
        time.sleep(delay)
        for rank in victims:
            self.members[rank].kill()
        self.join()
        return True

    def finish(self):
        """Let the run end; raises if a process fails."""
        try:
            while self.pipe.poll(PATIENCE):
                self.pipe.recv()
        except EOFError:
            pass
        self.join()
        codes = [member.exitcode for member in self.members]
        if any(codes):
            raise SystemExit(f"a resumed run ended with {codes}")

    def join(self):
        for member in self.members:
            member.join(PATIENCE)
            if member.is_alive():
                member.kill()
                raise SystemExit(f"a process did not end within {PATIENCE:g} s of another one's death")


def outcome(out):
    """What a run ends with, without times."""
    from fastres.train.checkpoint import load_checkpoint

    state = load_checkpoint(Path(out) / "checkpoint-last.pt")
    rows = [{k: v for k, v in row.items() if k not in TIMES} for row in state["rows"]]
    return {**{name: state[name] for name in COMPARED}, "rows": rows}


def differences(first, second, path=""):
    """Where two nested states differ."""
    import torch

    if isinstance(first, torch.Tensor):
        return [] if first.dtype == second.dtype and torch.equal(first, second) else [path]
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [path + " (keys)"]
        return [found for key in first for found in differences(first[key], second[key], f"{path}/{key}")]
    if isinstance(first, (list, tuple)):
        if len(first) != len(second):
            return [path + " (length)"]
        return [
            found
            for i, (a, b) in enumerate(zip(first, second, strict=True))
            for found in differences(a, b, f"{path}/{i}")
        ]
    return [] if first == second else [path]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sync-bn", action="store_true")
    options = parser.parse_args()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["fastres.train.loop", "sklearn.datasets", "torchvision.transforms.v2", "torch.utils.tensorboard"]
    )
    draw = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    try:
        Attempt(context, options.processes, folder / "whole", 0, options.sync_bn).finish()
        begin = time.perf_counter()
        Attempt(context, options.processes, folder / "again", 2, options.sync_bn).finish()
        step_time = (time.perf_counter() - begin) / (EPOCHS * STEPS)
        wanted = outcome(folder / "whole")
        wrong = differences(wanted, outcome(folder / "again"))
        if wrong:
            raise SystemExit(f"two uninterrupted runs differ in {', '.join(wrong[:5])}")
        failed = late = 0
        for point in range(options.points):
            out = folder / f"point-{point}"
            save_every = draw.choice([1, 2])
            for _ in range(2 if point % 4 == 3 else 1):
                step, delay = draw.randint(1, EPOCHS * STEPS), draw.random() * step_time
                victims = draw.choice([[0], [options.processes - 1], list(range(options.processes))])
                killed = Attempt(context, options.processes, out, save_every, options.sync_bn).kill_at(
                    step, delay, victims
                )
                late += not killed
            Attempt(context, options.processes, out, save_every, options.sync_bn).finish()
            wrong = differences(wanted, outcome(out))
            failed += bool(wrong)
            left = [path.name for path in out.glob(".*.part")]
            verdict = f"DIFFERS in {', '.join(wrong[:5])}" if wrong else "identical"
            print(
                f"point {point}: killed {victims} {delay * 1000:.0f} ms after step {step}: {verdict} {left or ''}",
                flush=True,
            )
            shutil.rmtree(out)
        print(f"{options.points - failed} of {options.points} points identical ({late} kills came after the end)")
        return int(failed > 0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
