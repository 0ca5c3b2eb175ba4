"""Runs training in several gloo processes on this machine."""

import multiprocessing
import os
import signal
import socket
import traceback

PATIENCE = 180.0  # seconds


class Acting:
    """A reporter that does nothing, or something at one step."""

    def __init__(self, at=None, action=None):
        self.at, self.action, self.messages = at, action, []

    def message(self, text):
        self.messages.append(text)

    def begin_epoch(self, epoch, epochs, batches, done):
        self.epoch = epoch

    def step(self, done, loss, accuracy, images_per_s, data_wait):
        if (self.epoch, done) == self.at:
            self.action()

    def end_epoch(self, row, epochs, best):
        pass

    def close(self):
        pass


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def work(rank, size, jobs, pipe):
    """Train each job: (port, settings, what to do). Sends ("ended", signal) or ("error", text) for each."""
    import torch

    from fastres.train import Settings, loop, train

    torch.set_num_threads(1)
    plain_step = loop.train_step
    for port, values, act in jobs:
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        reporter = Acting((1, 2), terminate) if act == "stop" else Acting()
        if act == "fail":

            def failing(run, images, labels):
                if run.world.rank == 1 and run.iteration == 1:
                    from fastres.errors import DataError

                    raise DataError("b/7.jpg can't be decoded")
                plain_step(run, images, labels)

            loop.train_step = failing
        if act == "die" and rank == 1:
            loop.train_step = lambda run, *batch: os.kill(os.getpid(), signal.SIGKILL)
        try:
            _, stopped = train(Settings(**values), reporter)
            pipe.send(("ended", stopped, reporter.messages))
        except Exception as error:
            pipe.send(("error", f"{type(error).__name__}: {error}", traceback.format_exc()))
        loop.train_step = plain_step
    pipe.close()


def run_ranks(size, jobs):
    """Train ``jobs``, pairs of settings and what to do, one after another in ``size`` processes; what each one sent."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastres.train.loop", "sklearn.datasets"])
    numbered = []
    for values, act in jobs:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            numbered.append((free.getsockname()[1], values, act))
    members, pipes = [], []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        members.append(context.Process(target=work, args=(rank, size, numbered, theirs)))
        members[-1].start()
        theirs.close()
        pipes.append(ours)
    sent = []
    try:
        for pipe in pipes:
            mine = []
            try:
                while len(mine) < len(jobs):
                    assert pipe.poll(PATIENCE), "a process neither ended nor failed"
                    mine.append(pipe.recv())
            except EOFError:
                mine.append(("gone", None, None))
            sent.append(mine)
    finally:
        for member in members:
            member.join(10)
            if member.is_alive():
                member.kill()
    return sent
