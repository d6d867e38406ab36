"""Checksummed downloads that continue where they were interrupted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import DownloadError, OutputError

Progress = Callable[[int, int | None], None]
"""Called with the bytes that have arrived and the size of the file, None where it is unknown."""

_CHUNK_SIZE = 1 << 16
_TIMEOUT = 30  # seconds of silence


def fetch(
    urls: Sequence[str], destination: Path, *, sha256: str, progress: Progress | None = None
) -> Path:
    """Download a file, unless it is there already.

    What has arrived of an interrupted download is kept beside `destination`, as a `.part` file
    named after the checksum, and continued by the next call. The file itself appears only when it
    is complete and its checksum is right. Two processes must not fetch the same file at a time.

    Parameters
    ----------
    urls
        Places that all hold the same file, tried in order.
    destination
        Where the file is wanted; its folder is created. A file there with another checksum is
        replaced.
    sha256
        The file's SHA-256 in hexadecimal.
    progress
        Told about every 64 KiB.

    Returns
    -------
    pathlib.Path
        `destination`.

    Raises
    ------
    DownloadError
        No URL answered with the whole file, or what came has another checksum and was deleted.
    OutputError
        The folder cannot be written to.
    """
    import pooch
    import requests

    downloader = _ResumingDownloader(_part_path(destination, sha256), progress)
    failures = []
    for url in urls:
        try:
            pooch.retrieve(
                url,
                known_hash=f"sha256:{sha256}",
                fname=destination.name,
                path=destination.parent,
                downloader=downloader,
            )
        except requests.RequestException as error:
            failures.append(f"{url}: {error}")
        except ValueError as error:  # pooch's word for a wrong checksum
            failures.append(f"{url}: {error}")
        except OSError as error:
            raise OutputError(f"cannot write {destination}: {error.strerror or error}") from error
        else:
            return destination
    raise DownloadError(
        f"cannot download {destination.name}; try again to continue, or put the file at "
        f"{destination} yourself.\n" + "\n".join(failures)
    )


def _part_path(destination: Path, sha256: str) -> Path:
    """Named after the checksum, so that a part is never continued with another version's bytes."""
    return destination.with_name(f"{destination.name}.{sha256[:12]}.part")


class _ResumingDownloader:
    """A downloader for pooch that appends to a part file.

    Pooch gives its downloaders a temporary file that it deletes if anything goes wrong, so the
    bytes are gathered in the part file, which becomes pooch's temporary file when all are there.
    """

    def __init__(self, part: Path, progress: Progress | None) -> None:
        self.part = part
        self.progress = progress

    def __call__(self, url: str, output_file: str, pooch: Any) -> None:
        import requests

        received = self.part.stat().st_size if self.part.exists() else 0
        # A compressed answer would count other bytes than those of the file.
        headers = {"Accept-Encoding": "identity"}
        if received:
            headers["Range"] = f"bytes={received}-"
        with requests.get(url, headers=headers, stream=True, timeout=_TIMEOUT) as response:
            # 416: nothing comes after the part. It is complete or wrong, and the checksum decides.
            if response.status_code != requests.codes.requested_range_not_satisfiable:
                response.raise_for_status()
                self._receive(response, received)
        self.part.replace(output_file)

    def _receive(self, response: Any, received: int) -> None:
        import requests

        continues = response.status_code == requests.codes.partial_content
        received = received if continues else 0  # a server that knows no ranges starts again
        length = response.headers.get("Content-Length")
        total = received + int(length) if length else None
        with self.part.open("ab" if continues else "wb") as file:
            for chunk in response.iter_content(_CHUNK_SIZE):
                file.write(chunk)
                received += len(chunk)
                if self.progress:
                    self.progress(received, total)
