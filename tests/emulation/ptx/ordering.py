"""What the blocks of a cooperative launch may know of each other's stores to global memory.

A store is seen by another block once: a barrier brought the storing threads to the one that speaks for them, that thread
made a fence and then an atomic, a thread of the other block looked at the same word and made a fence, and a barrier brought
that to its own block. Blocks are what is told apart here, by vector clocks; who stores within a block is checked as far as
the fence goes.
"""

import numpy as np


class Ordering:
    def __init__(self, blocks: int, threads: int) -> None:
        """``threads``: of one block."""
        self.threads = threads
        self.clock = np.ones(blocks, np.int64)  # of each block's next store
        self.known = np.zeros((blocks, blocks), np.int64)  # [reader, writer]: stores up to this clock are seen
        self.covered = np.zeros_like(self.known)  # what an atomic of the block tells: all before its last fence
        self.heard = np.zeros_like(self.known)  # what is known from the next fence on
        self.words: dict[int, np.ndarray] = {}
        self.storing = np.zeros(blocks * threads, bool)  # since the block's last barrier

    def store(self, threads: np.ndarray) -> None:
        self.storing[threads] = True

    def barrier(self, blocks: np.ndarray) -> None:
        """``blocks`` [blocks]: whose threads met."""
        self.clock[blocks] += 1
        self.storing.reshape(len(self.clock), -1)[blocks] = False

    def fence(self, threads: np.ndarray) -> None:
        for block in np.unique(threads // self.threads):
            others = self.storing[block * self.threads : (block + 1) * self.threads].copy()
            others[threads[threads // self.threads == block] % self.threads] = False
            self.known[block] = np.maximum(self.known[block], self.heard[block])
            self.covered[block] = self.known[block]
            self.covered[block, block] = self.clock[block] - others.any()  # a fence orders its own thread's stores
            self.clock[block] += not others.any()

    def atomic(self, addresses: np.ndarray, threads: np.ndarray) -> None:
        for address, block in zip(addresses.tolist(), threads // self.threads, strict=True):
            told = np.maximum(self.words.get(address, 0), self.covered[block])
            self.words[address] = told
            self.heard[block] = np.maximum(self.heard[block], told)

    def look(self, addresses: np.ndarray, threads: np.ndarray) -> None:
        """A load that the compiler may not leave out."""
        for address, block in zip(addresses.tolist(), threads // self.threads, strict=True):
            if address in self.words:
                self.heard[block] = np.maximum(self.heard[block], self.words[address])

    def sees(self, readers: np.ndarray, writers: np.ndarray, clocks: np.ndarray) -> np.ndarray:
        """Whether each reading block sees what a writing block stored at that clock."""
        return self.known[readers, writers] >= clocks
