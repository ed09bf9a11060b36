"""Servers are slow, fail and lie; what stands in the folder is whole all the same, and the rest is named."""

import http.server
import io
import threading
import time
from collections import Counter
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path

import pytest
from PIL import Image

from finetuning.cli import read
from finetuning.conversion.download import DownloadArgs, Fetcher, Turns, Unfetched, arrived, place
from finetuning.conversion.writer import WritingArgs
from finetuning.data.findings import DatasetError, Findings
from finetuning.data.images import open_rgb
from finetuning.data.samples import Sample


def png(color="red", size=(4, 4)):
    content = io.BytesIO()
    Image.new("RGB", size, color).save(content, "PNG")
    return content.getvalue()


@dataclass
class Reply:
    """What the server says to one request."""

    status: int = 200
    body: bytes = png()
    kind: str = "image/png"
    headers: tuple = ()
    promised: int | None = None  # Content-Length, where it is a lie


class Server(http.server.ThreadingHTTPServer):
    """Answers a path with its replies in turn, the last one for ever; counts what it is asked for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.asked, self.agents = {}, Counter(), set()
        self.address = f"http://127.0.0.1:{self.server_port}"

    def on(self, path, *replies):
        self.replies[path] = list(replies)
        return f"{self.address}{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked[self.path] += 1
        self.server.agents.add(self.headers["User-Agent"])
        replies = self.server.replies.get(self.path, [Reply(404, b"gone", "text/html")])
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.kind)
        self.send_header("Content-Length", len(reply.body) if reply.promised is None else reply.promised)
        for name, value in reply.headers:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(reply.body)
        self.close_connection = True

    def log_message(self, *_):
        """Nothing on the screen."""


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@dataclass
class Args(DownloadArgs):
    """The flags that `arrived` reads."""

    limit: int | None = None


def settings(tmp_path, **changed):
    usual = {"images": str(tmp_path / "images"), "download": True, "download_rate": 1e6, "download_tries": 2}
    return Args(**(usual | changed))


class Clock:
    """Time that passes only when someone sleeps."""

    def __init__(self):
        self.now, self.slept = 100.0, []

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def fetcher(tmp_path):
    """Make a Fetcher of some flags, whose waiting takes no time."""

    def make(**changed):
        clock = Clock()
        return Fetcher(settings(tmp_path, **changed), clock, clock.sleep), clock

    return make


def item(tmp_path, name, url):
    return Sample(name, tmp_path / "images" / name, (name,), f"list line {name}"), url


def take(items, args):
    findings = Findings()
    return [sample.name for sample in arrived(items, args, findings)], findings.as_dict()["errors"]


def files(folder):
    return sorted(path.name for path in Path(folder).rglob("*") if path.is_file())


def test_images_are_fetched_once_in_order_and_under_our_name(tmp_path, server):
    names = [f"{number}.png" for number in range(12)]
    colors = [(20 * number, 0, 0) for number in range(12)]
    urls = [server.on(f"/{name}", Reply(body=png(color))) for name, color in zip(names, colors, strict=True)]
    items = [item(tmp_path, *pair) for pair in zip(names, urls, strict=True)]
    args = settings(tmp_path, download_workers=2)
    assert take(items, args) == (names, {})
    assert [open_rgb(sample.image).getpixel((0, 0)) for sample, _ in items] == colors
    assert take(items, args) == (names, {})
    assert set(server.asked.values()) == {1}
    assert files(args.images) == sorted(names)
    (agent,) = server.agents
    assert agent.startswith("prepare_dataset.py")


def test_without_download_nothing_is_asked_for(tmp_path, server):
    args = settings(tmp_path, download=False)
    Path(args.images).mkdir()
    (tmp_path / "images/here.png").write_bytes(png())
    items = [item(tmp_path, name, server.on(f"/{name}", Reply())) for name in ("away.png", "here.png")]
    names, errors = take(items, args)
    assert names == ["here.png"]
    ((kind, examples),) = errors.items()
    assert kind == "image_not_here" and examples == ["list line away.png (away.png)"]
    assert not server.asked


@pytest.mark.parametrize(
    ("reply", "reason", "asked"),
    [
        (Reply(404, b"gone", "text/html"), "HTTP 404 Not Found", 1),
        (Reply(410, b"", "text/html"), "HTTP 410 Gone", 1),
        (Reply(403, b"", "text/html"), "HTTP 403 Forbidden", 1),
        (Reply(500), "HTTP 500 Internal Server Error", 3),
        (Reply(body=b"<html>log in</html>", kind="text/html; charset=utf-8"), "text/html instead of an image", 1),
        (Reply(body=b"not one"), "not a whole image", 1),
        (Reply(body=png(size=(64, 64))[:-60]), "not a whole image", 1),
        (Reply(body=b""), "not a whole image", 1),
        (Reply(body=png()[:-5], promised=len(png())), "RemoteProtocolError", 3),
        (Reply(body=bytes(2100)), "larger than --download_max_mb 0.002", 1),
        (Reply(302, headers=[("Location", "ftp://127.0.0.1/x.png")]), "ftp://", 1),
        (Reply(302, headers=[("Location", "/one.png")]), "redirects", 21),
    ],
)
def test_what_cannot_be_had_has_its_reason_and_leaves_nothing(tmp_path, server, fetcher, reply, reason, asked):
    fetch, _ = fetcher(download_tries=3, download_max_mb=0.002)
    with pytest.raises(Unfetched, match=reason):
        fetch.fetch(server.on("/one.png", reply), tmp_path / "one.png")
    assert server.asked["/one.png"] == asked
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "url", ["file:///etc/hostname", "ftp://127.0.0.1/x.png", "x.png", "", None, "http://[", "http://"]
)
def test_only_the_web_is_asked(tmp_path, fetcher, url):
    with pytest.raises(Unfetched):
        fetcher(download_tries=1)[0].fetch(url, tmp_path / "one.png")


@pytest.mark.parametrize(
    ("failure", "slept"),
    [
        (Reply(500), [1]),
        (Reply(body=png()[:-5], promised=len(png())), [1]),
        (Reply(429, headers=[("Retry-After", "7")]), [7]),
        (Reply(503, headers=[("Retry-After", "soon")]), [1]),
    ],
)
def test_a_failure_that_may_pass_is_tried_again_after_a_pause(tmp_path, server, fetcher, failure, slept):
    fetch, clock = fetcher(download_tries=2)
    fetch.fetch(server.on("/one.png", failure, Reply(body=png("blue"))), tmp_path / "one.png")
    assert open_rgb(tmp_path / "one.png").getpixel((0, 0)) == (0, 0, 255)
    assert clock.slept == pytest.approx(slept, abs=1e-4)


def test_a_pause_that_a_site_asks_for_as_a_date_is_kept(tmp_path, server, fetcher):
    fetch, clock = fetcher(download_tries=2)
    wait = Reply(503, headers=[("Retry-After", formatdate(time.time() + 60, usegmt=True))])
    fetch.fetch(server.on("/one.png", wait, Reply()), tmp_path / "one.png")
    assert sum(clock.slept) == pytest.approx(60, abs=10)


def test_a_site_that_wants_to_be_left_in_peace_ends_the_run(tmp_path, server):
    urls = [server.on(f"/{n}.png", Reply(429, headers=[("Retry-After", "3600")])) for n in range(200)]
    items = [item(tmp_path, f"{n}.png", url) for n, url in enumerate(urls)]
    with pytest.raises(DatasetError, match=r"127\.0\.0\.1 asks to be left in peace for 3600 s \(HTTP 429"):
        take(items, settings(tmp_path, download_workers=2))
    assert sum(server.asked.values()) < 20


def test_an_image_that_drips_is_given_up(tmp_path, server, fetcher):
    fetch, _ = fetcher(download_tries=1, download_timeout=5.0)
    ticks = iter(range(0, 1000, 3))
    fetch.clock = lambda: next(ticks)  # three seconds pass at every look
    with pytest.raises(Unfetched, match="slower than --download_timeout 5"):
        fetch.fetch(server.on("/one.png", Reply(body=bytes(2_000_000))), tmp_path / "one.png")
    assert files(tmp_path) == []


def test_turns_are_shared_by_all_threads():
    clock = Clock()
    turns = Turns(4, clock, clock.sleep)
    times = []
    for _ in range(5):
        turns.wait()
        times.append(clock())
    assert times == pytest.approx([100, 100.25, 100.5, 100.75, 101])
    turns.pause(3)
    turns.wait()
    assert clock() == pytest.approx(104)
    clock.now += 50  # turns that nobody took are not saved up
    for _ in range(2):
        turns.wait()
    assert clock() == pytest.approx(154.25)


def test_what_failed_is_listed_and_the_rest_taken(tmp_path, server):
    good = server.on("/good.png", Reply())
    bad = server.on("/bad.png", Reply(body=b"<html>", kind="text/html"))
    items = [item(tmp_path, "bad.png", bad), item(tmp_path, "gone.png", f"{server.address}/gone.png")]
    names, errors = take([*items, item(tmp_path, "good.png", good)], settings(tmp_path))
    assert names == ["good.png"]
    assert errors == {
        "not_fetched": [
            f"list line bad.png ({bad}: text/html instead of an image)",
            f"list line gone.png ({server.address}/gone.png: HTTP 404 Not Found)",
        ]
    }


def test_what_is_gone_is_not_asked_for_again_and_what_failed_is(tmp_path, server):
    args = settings(tmp_path, download_tries=1)
    failing = server.on("/failing.png", Reply(500), Reply())
    items = [item(tmp_path, "failing.png", failing), item(tmp_path, "gone.png", f"{server.address}/gone.png")]
    assert take(items, args)[0] == []
    with open(tmp_path / "images/gone.jsonl", "a", encoding="utf-8") as file:
        file.write('{"url": "http')  # a killed run's last line
    names, errors = take(items, args)
    assert names == ["failing.png"]
    assert server.asked == {"/failing.png": 2, "/gone.png": 1}
    (told,) = errors["not_fetched"]
    assert "HTTP 404 Not Found, as " in told and "gone.jsonl says" in told
    (tmp_path / "images/gone.jsonl").unlink()
    server.on("/gone.png", Reply())
    assert take(items, args) == (["failing.png", "gone.png"], {})


def test_flickrs_image_for_deleted_photos_is_not_taken(tmp_path, server):
    server.on("/images/en-us/photo_unavailable.png", Reply())
    dead = server.on("/1_a.jpg", Reply(302, headers=[("Location", "/images/en-us/photo_unavailable.png")]))
    moved = server.on("/2_b.jpg", Reply(302, headers=[("Location", "/elsewhere/2_b.jpg")]))
    server.on("/elsewhere/2_b.jpg", Reply())
    names, errors = take([item(tmp_path, "1.jpg", dead), item(tmp_path, "2.jpg", moved)], settings(tmp_path))
    assert names == ["2.jpg"]
    assert "deleted photos" in str(errors)
    assert dead in (tmp_path / "images/gone.jsonl").read_text()


def test_an_interrupted_download_goes_on_where_it_was(tmp_path, server):
    items = [item(tmp_path, f"{n}.png", server.on(f"/{n}.png", Reply())) for n in range(20)]
    args = settings(tmp_path, download_workers=1)
    results = arrived(items, args, Findings())
    assert [next(results).name for _ in range(3)] == ["0.png", "1.png", "2.png"]
    results.close()
    stood = set(files(args.images))
    assert {"0.png", "1.png", "2.png"} <= stood < {sample.name for sample, _ in items}
    (tmp_path / "images/.incomplete-1-9.png").write_bytes(b"half")  # what a kill leaves
    assert take(items, args)[0] == [sample.name for sample, _ in items]
    assert set(server.asked.values()) == {1}
    assert set(files(args.images)) - {".incomplete-1-9.png"} == {sample.name for sample, _ in items}


def test_an_interruption_does_not_wait_for_the_pauses_that_a_site_asked_for(tmp_path, server):
    items = [item(tmp_path, f"{n}.png", server.on(f"/{n}.png", Reply())) for n in range(20)]
    server.on("/1.png", Reply(503, headers=[("Retry-After", "100")]))
    results = arrived(items, settings(tmp_path, download_workers=2), Findings())
    assert next(results).name == "0.png"
    while not server.asked["/1.png"]:
        time.sleep(0.01)
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 50


@pytest.mark.parametrize("download", [True, False])
def test_limit_counts_images_that_are_there_and_ends_the_work(tmp_path, server, download):
    items = [item(tmp_path, f"{n}.png", server.on(f"/{n}.png", Reply())) for n in range(100)]
    del server.replies["/0.png"]
    args = settings(tmp_path, download_workers=1, limit=3, download=download)
    if not download:
        Path(args.images).mkdir()
        for n in range(1, 100):
            (tmp_path / f"images/{n}.png").write_bytes(png())
    names, errors = take(items, args)
    assert names == ["1.png", "2.png", "3.png"]
    assert len(errors) == 1
    assert len(server.asked) < 20


def test_a_folder_that_cannot_be_written_ends_the_run(tmp_path, server):
    (tmp_path / "images").write_text("a file")
    with pytest.raises(DatasetError, match=r"one\.png cannot be written"):
        take([item(tmp_path, "one.png", server.on("/one.png", Reply()))], settings(tmp_path))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("a.jpg", "a.jpg"), ("./sub/a.jpg", "sub/a.jpg"), ("sub/../a.jpg", "a.jpg"), ("ä b.jpg", "ä b.jpg"),
        ("../a.jpg", None), ("sub/../../a.jpg", None), ("/etc/passwd", None), ("//host/a.jpg", None), ("", None),
        (".", None), ("a\0.jpg", None), ("\ud800.jpg", None), (f"{'x' * 300}.jpg", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("folder", ["images", "../images", "."])
def test_a_name_stays_inside_its_folder(folder, name, found):
    assert place(Path(folder), name) == (Path(folder) / found if found else None)


@pytest.mark.parametrize(
    ("flags", "named"),
    [("--images nowhere", "--images nowhere"), ("--download --images out/images --output ./out", "--images")],
)
def test_folders_that_cannot_be_are_named(flags, named):
    @dataclass
    class Both(DownloadArgs, WritingArgs):
        """What convert has."""

    output = [] if "--output" in flags else ["--output", "out"]
    _, problems = read(Both, "", [*flags.split(), *output])
    assert any(named in problem for problem in problems)
