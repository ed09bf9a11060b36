"""Images that a source names by address: taken from a folder of the user's, or fetched into it, each once.

What stands in the folder is whole: an image is written to a temporary file, decoded and renamed. So the same command
goes on after an interruption. gone.jsonl in the folder keeps the addresses that hold no image any more; delete it to
ask anew.
"""

import json
import os
import re
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

from tqdm.auto import tqdm

from finetuning.cli import flag
from finetuning.data.findings import DatasetError
from finetuning.data.images import UnreadableImage, open_rgb
from finetuning.data.threads import in_order
from finetuning.files import atomic_file, overlap, read_json_lines

HEADERS = {"User-Agent": "prepare_dataset.py (diffusers fine-tuning)", "Accept": "image/*"}
TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
GONE = {404, 410}
LONGEST_PAUSE = 120  # seconds; a site that asks for more is left in peace


@dataclass
class DownloadArgs:
    """Images by address (unsplash, sbu)"""

    images: str | None = flag(None, "folder of the images, named as in the source", metavar="DIR", affects_result=False)
    download: bool = flag(False, "fetch into --images what is not there", requires="images", affects_result=False)
    download_rate: float = flag(10.0, "images asked for in a second, at most", above=0, affects_result=False)
    download_workers: int = flag(8, "threads that fetch", min=1, affects_result=False)
    download_tries: int = flag(4, "times to ask for an image where site or network fails", min=1, affects_result=False)
    download_timeout: float = flag(60.0, "seconds that one try may take", above=0, affects_result=False)
    download_max_mb: float = flag(100.0, "take no file larger than this, in MB", above=0, affects_result=False)

    def problems(self):
        if self.images and not self.download and not Path(self.images).is_dir():
            yield f"--images {self.images}: there is no such folder (--download makes it)"
        output = getattr(self, "output", None)
        if self.images and output and overlap(self.images, output):
            yield f"--images {self.images} and --output {output} lie one in the other: name folders apart"


def arrived(items, args, findings):
    """Yield the sample of each (sample, url or None), in order, once its image stands at `sample.image`.

    With --download those that do not stand are fetched. What cannot be had is an error with its reason. Ends after
    --limit samples. Raises DatasetError where the folder cannot be written or the site sends us away.
    """
    count = 0
    standing = ((one, None if one.image.is_file() else ("image_not_here", one.image.name)) for one, _ in items)
    with closing(_fetched(items, args) if args.download else standing) as results:
        for sample, trouble in results:
            if trouble:
                code, reason = trouble
                findings.error(code, sample.origin, reason)
                continue
            yield sample
            count += 1
            if count == args.limit:
                return


def place(folder, name):
    """The path of `name` in the folder; None where that would be elsewhere."""
    parts = Path(os.path.normpath(name)).parts
    if not parts or parts[0] in ("/", "//", "..") or not name.isprintable():  # surrogates and NUL are not
        return None
    return None if any(len(part.encode()) > 230 for part in parts) else folder.joinpath(*parts)


def read_json(path):
    """What a source's JSON file holds. Raises DatasetError."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise DatasetError(f"{path} cannot be read as JSON: {error}") from error


def _fetched(items, args):
    """(sample, trouble) in order; few images are under way at once."""
    journal = Path(args.images) / "gone.jsonl"
    fetcher, gone = Fetcher(args), {row["url"]: row["reason"] for row in read_json_lines(journal)}

    def work(item):
        sample, url = item
        if sample.image.is_file():
            return
        if url in gone:
            raise Unfetched(f"{gone[url]}, as {journal} says")
        try:
            sample.image.parent.mkdir(parents=True, exist_ok=True)
            fetcher.fetch(url, sample.image)
        except OSError as error:
            raise DatasetError(f"{sample.image} cannot be written: {error}") from error

    shown = tqdm(items, "fetching", unit="image")
    with (
        closing(fetcher.client),
        closing(in_order(work, shown, args.download_workers, Unfetched, stop=fetcher.stop.set)) as results,
    ):
        for (sample, url), trouble in results:
            if trouble and trouble.gone:
                with open(journal, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"url": url, "reason": str(trouble)}) + "\n")
            yield sample, trouble and ("not_fetched", f"{url}: {trouble}")


class Unfetched(Exception):
    """Why an image could not be had: `gone` for good, or worth `another_try` after `pause` seconds (none: a few)."""

    def __init__(self, reason, gone=False, another_try=False, pause=None):
        super().__init__(reason)
        self.gone, self.another_try, self.pause = gone, another_try, pause


class Turns:
    """Who may ask when, over all threads: `rate` times a second, and not before a pause that the site asked for."""

    def __init__(self, rate, clock, sleep):
        self.rate, self.clock, self.sleep = rate, clock, sleep
        self.lock, self.next = threading.Lock(), clock()

    def wait(self):
        with self.lock:
            now = self.clock()
            turn = max(now, self.next)
            self.next = turn + 1 / self.rate
        if turn > now:
            self.sleep(turn - now)

    def pause(self, seconds):
        with self.lock:
            self.next = max(self.next, self.clock() + seconds)


class Fetcher:
    """Fetches images, for many threads at once. `stop` is an event that ends all of its waiting."""

    def __init__(self, args, clock=time.monotonic, sleep=None):
        import httpx2  # a slow import that images of this disk do not need

        self.args, self.clock, self.stop = args, clock, threading.Event()
        self.sleep = sleep or self.stop.wait
        self.turns = Turns(args.download_rate, clock, self.sleep)
        self.client = httpx2.Client(headers=HEADERS, timeout=args.download_timeout, follow_redirects=True)

    def fetch(self, url, target):
        """Put the image of `url` at `target`. Raises Unfetched; OSError where the disk fails."""
        if not re.match(r"https?://", url or "", re.IGNORECASE):
            raise Unfetched("not an address of the web (http, https)")
        for left in reversed(range(self.args.download_tries)):
            self.turns.wait()
            if self.stop.is_set():
                raise Unfetched("interrupted")
            try:
                return self._try(url, target)
            except Unfetched as trouble:
                if not (trouble.another_try and left):
                    raise
                if trouble.pause is None:
                    self.sleep(min(2.0 ** (self.args.download_tries - 1 - left), LONGEST_PAUSE))
                else:
                    self.turns.pause(trouble.pause)

    def _try(self, url, target):
        import httpx2

        try:
            with atomic_file(target) as temporary:
                with self.client.stream("GET", url) as response:
                    self._check(response)
                    self._store(response, temporary)
                open_rgb(temporary)
        except (httpx2.UnsupportedProtocol, httpx2.TooManyRedirects, httpx2.InvalidURL) as error:
            raise Unfetched(str(error)) from error
        except httpx2.RequestError as error:  # no answer, a broken connection, half an image
            raise Unfetched(f"{type(error).__name__}: {error}".rstrip(": "), another_try=True) from error
        except UnreadableImage as error:
            raise Unfetched("what came is not a whole image") from error

    def _check(self, response):
        status, pause = response.status_code, _retry_after(response)
        answer = f"HTTP {status} {response.reason_phrase}".rstrip()
        if status in TRY_AGAIN and pause is not None and pause > LONGEST_PAUSE:
            asks = f"{response.url.host} asks to be left in peace for {pause:.0f} s ({answer})"
            raise DatasetError(f"{asks}: give the same command again then; what has been fetched is kept")
        if status in TRY_AGAIN:
            raise Unfetched(answer, another_try=True, pause=pause)
        if status != 200:
            raise Unfetched(answer, gone=status in GONE)
        if Path(response.url.path).name.startswith("photo_unavailable"):
            raise Unfetched("Flickr shows its image for deleted photos", gone=True)
        kind = response.headers.get("Content-Type", "").split(";")[0]
        if kind.startswith("text/") or kind == "application/json":
            raise Unfetched(f"{kind} instead of an image")

    def _store(self, response, temporary):
        limit, end, size = self.args.download_max_mb * 1e6, self.clock() + self.args.download_timeout, 0
        with open(temporary, "wb") as file:
            for part in response.iter_bytes():
                size += len(part)
                if size > limit:
                    raise Unfetched(f"larger than --download_max_mb {self.args.download_max_mb:g}")
                if self.clock() > end:
                    raise Unfetched(f"slower than --download_timeout {self.args.download_timeout:g}", another_try=True)
                file.write(part)


def _retry_after(response):
    """Seconds that the site asks to wait, which it says in seconds or as a date; none where it does not say."""
    answer = response.headers.get("Retry-After", "").strip()
    if answer.isdecimal():
        return float(answer)
    try:
        return max(0.0, parsedate_to_datetime(answer).timestamp() - time.time())
    except ValueError:
        return None
