"""libsndfile as a decoder that goes on where it stands."""

from typing import Any

import soundfile

__all__ = ["Decoder"]


class Decoder(soundfile.SoundFile):
    """A file to be read block by block, whose blocks are those of one decoding of the whole.

    ``soundfile`` ends every read by seeking to where the decoder stands already. For an MP3 that is a new start: its
    frames borrow bits from those before them, which are gone then. With a variable bitrate a few hundred samples behind
    the seam were noise, and libmpg123 complained (python-soundfile issue 402). So a file says while it is read that it
    cannot seek.
    """

    _reading = False

    def seekable(self) -> bool:
        return not self._reading and bool(super().seekable())

    def read(self, *args: Any, **options: Any) -> Any:
        """As ``SoundFile.read``; the number of frames, or ``out``, must be given."""
        self._reading = True
        try:
            return super().read(*args, **options)
        finally:
            self._reading = False
