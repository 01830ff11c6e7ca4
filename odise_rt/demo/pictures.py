"""Pictures that visitors of the page look at: kept in memory only, and only as many as fit.

A picture is known by a random token. Whoever holds the token may see it, so tokens are as long as a password and never
logged. The store forgets the pictures that were used longest ago when it is full, those beyond a few of one visitor,
and all of a visitor who leaves.
"""

from __future__ import annotations

import functools
import io
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from odise_rt.errors import InputError
from odise_rt.image_run import MaskProposals

SHOWN_LONG_EDGE = 1024
"""Pixels of a picture's longer edge on the page. Masks are named at this size there, which keeps sliders swift whatever
a camera's resolution; downloads have the picture's own size."""
SEMANTIC_LONG_EDGE = 640
"""The same for semantic maps, which cost the number of pixels times that of classes."""
MAX_ENLARGEMENT = 4
"""Small pictures are enlarged at most this many times: masks stay smooth, as they are not made of pixels."""

Value = TypeVar("Value")


class GoneError(InputError):
    """A picture or a result that is not, or no longer, in memory."""


class BoundedCache(Generic[Value]):
    """The values used last, at most ``size`` of them; threads may share it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[str, Value] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: str) -> Value | None:
        """The value of a key, if it is still here."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: str, value: Value) -> None:
        """Keep a value, and forget the one used longest ago if there are too many."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            while len(self._values) > self._size:
                self._values.popitem(last=False)


@dataclass(eq=False)
class Picture:
    """One picture of one visitor."""

    name: str
    """File name as the visitor has it, for display and for the names of downloads."""
    pixels: np.ndarray
    """uint8 (h, w, 3) RGB."""
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    owner: str | None = None
    """Session of the visitor; ``None`` until the page has used the picture."""
    used: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    """Held while the network runs, so that it runs once."""
    proposals: MaskProposals | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def shown_size(self, long_edge: int = SHOWN_LONG_EDGE) -> tuple[int, int]:
        """Height and width on the page."""
        height, width = self.size
        scale = min(long_edge / max(height, width), MAX_ENLARGEMENT)
        return max(1, round(height * scale)), max(1, round(width * scale))

    @property
    def described(self) -> dict[str, str | int]:
        """For the page."""
        return {"token": self.token, "name": self.name, "height": self.size[0], "width": self.size[1]}

    @property
    def nbytes(self) -> int:
        """Memory that it holds, without what Python itself needs."""
        total = self.pixels.nbytes
        if self.proposals is not None:
            embeddings = self.proposals.embeddings
            total += self.proposals.masks.nbytes + embeddings.mask.nbytes + embeddings.clip.nbytes
        return total

    @functools.cached_property
    def shown(self) -> bytes:
        """The picture for the page as a JPEG file, not larger than on the page; made anew, not what was uploaded."""
        from PIL import Image

        image = Image.fromarray(self.pixels)
        height, width = self.shown_size()
        if height < self.size[0]:
            image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=92, subsampling=0)
        return buffer.getvalue()


class PictureStore:
    """Pictures by their tokens, within bounds; threads may share it."""

    def __init__(
        self,
        max_bytes: int = 1 << 30,
        max_per_owner: int = 30,
        idle_seconds: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Bounds of the store.

        Args:
            max_bytes: memory of all pictures and their masks. One picture is kept even if it alone is larger.
            max_per_owner: pictures of one visitor.
            idle_seconds: a picture that nobody used for so long is forgotten.
            clock: seconds that only grow.
        """
        self._max_bytes = max_bytes
        self._max_per_owner = max_per_owner
        self._idle_seconds = idle_seconds
        self._clock = clock
        self._pictures: OrderedDict[str, Picture] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, picture: Picture, owner: str | None = None) -> Picture:
        """Keep a picture; older ones give way."""
        with self._lock:
            picture.owner = owner
            picture.used = self._clock()
            self._pictures[picture.token] = picture
            self._tidy(picture)
        return picture

    def get(self, token: str, owner: str | None = None) -> Picture:
        """A picture by its token.

        Args:
            token: of the picture.
            owner: session that uses it from now on, if any.

        Raises:
            GoneError: it is not, or no longer, in memory.
        """
        with self._lock:
            picture = self._pictures.get(token)
            if picture is None:
                raise GoneError("this picture is no longer in the server's memory: drop it again")
            picture.used = self._clock()
            if owner is not None:
                picture.owner = owner
            self._pictures.move_to_end(token)
            self._tidy(picture)
            return picture

    def remove(self, token: str) -> None:
        """Drop a picture, if it is here."""
        with self._lock:
            self._pictures.pop(token, None)

    def forget(self, owner: str) -> None:
        """Drop every picture of a visitor."""
        with self._lock:
            for token in [t for t, p in self._pictures.items() if p.owner == owner]:
                del self._pictures[token]

    def __len__(self) -> int:
        return len(self._pictures)

    def _tidy(self, newest: Picture) -> None:
        """Forget what is idle, beyond a visitor's share, or beyond the memory; the caller holds the lock."""
        limit = self._clock() - self._idle_seconds
        mine = [t for t, p in self._pictures.items() if p.owner is not None and p.owner == newest.owner]
        surplus = set(mine[: -self._max_per_owner])
        for token, picture in list(self._pictures.items()):
            if picture is not newest and (picture.used < limit or token in surplus):
                del self._pictures[token]
        total = sum(p.nbytes for p in self._pictures.values())
        while total > self._max_bytes and len(self._pictures) > 1:
            total -= self._pictures.popitem(last=False)[1].nbytes
