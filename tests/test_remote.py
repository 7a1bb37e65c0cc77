"A config from an https address: a real TLS server on loopback, friendly and hostile"
import hashlib, os
from http.server import BaseHTTPRequestHandler
import pytest
from tuneforge.config import load_config
from tuneforge.document import ConfigError, UserError
from tuneforge.remote import MAX_BYTES, is_private
from tests.tools import serving

GOOD = "base_model: tiny:llama\ndatasets: [{path: x.jsonl}]\nlearning_rate: 1e-4\n"
PAGES = {"/c.yml": GOOD, "/sub/mine.yml": "extends: ../c.yml\nseed: 5\n", "/env.yml": GOOD+"output_dir: ${HOME}/x\n", "/page.yml": "<!doctype html><html>", "/big.yml": "# "+"x"*(MAX_BYTES+10), "/typo.yml": GOOD+"sed: 1\n", "/bytes.yml": b"a: \xff"}
MOVES = {"/same.yml": "/c.yml", "/loop.yml": "/loop.yml"}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path in MOVES or self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", MOVES.get(self.path) or self.path[4:])
            return self.end_headers()
        page = PAGES.get(self.path)
        self.send_response(200 if page else 404)
        self.end_headers()
        self.wfile.write(page if isinstance(page, bytes) else (page or "").encode())
    def log_message(self, *args): pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "A server whose certificate this process trusts"
    with serving(Handler, tmp_path_factory.mktemp("ca")/"ca.pem") as url: yield url


def test_an_address_works_like_a_file(site, caplog):
    cfg = load_config(site+"/c.yml", ["--seed", "3"])
    assert (cfg.seed, cfg.datasets[0].path)==(3, "x.jsonl") and cfg.where("learning_rate")==f"{site}/c.yml:3"
    assert hashlib.sha256(GOOD.encode()).hexdigest() in caplog.text
    with pytest.raises(ConfigError, match="typo.yml:4:1: unknown key `sed`, did you mean `seed`"): load_config(site+"/typo.yml")


def test_bases_are_found_beside_it(site, tmp_path):
    assert load_config(site+"/sub/mine.yml").seed==5
    (tmp_path/"local.yml").write_text(f"extends: {site}/c.yml\nseed: 6\n")
    assert load_config(tmp_path/"local.yml").seed==6


@pytest.mark.parametrize("path, says", [("/gone.yml", "404"), ("/page.yml", "a web page"), ("/big.yml", "larger than 1,048,576 bytes"), ("/bytes.yml", "not UTF-8"), ("/loop.yml", "cannot fetch"), ("/to/http://example.org/c.yml", "which is not https"),
    ("/to/https://localhost:1/c.yml", "a private address"), ("/to/https://169.254.169.254/latest", "a private address"), ("/to/https://[::1]/c.yml", "a private address"), ("/to/https://2130706433/c.yml", "a private address"), ("/to/https://10.0.0.1/c", "a private address")])
def test_what_is_refused(site, path, says):
    with pytest.raises(UserError, match=says): load_config(site+path)


def test_redirects_on_the_same_server_are_followed(site): assert load_config(site+"/same.yml").base_model=="tiny:llama"


def test_variables_are_not_told(site):
    with pytest.raises(ConfigError, match="may not read environment"): load_config(site+"/env.yml")


def test_no_code_of_this_machine_is_named(site):
    import tuneforge.chat
    PAGES["/code.yml"] = GOOD.replace("path: x.jsonl", "path: x.jsonl, type: 'os:system'")
    with pytest.raises(ConfigError, match="code.yml:2:34: `type: os:system`: a config from the network may not name code"): load_config(site+"/code.yml")
    PAGES["/alpaca.yml"] = GOOD.replace("path: x.jsonl", "path: x.jsonl, type: 'alpaca:chat'")
    assert load_config(site+"/alpaca.yml").datasets[0].type=="alpaca:chat"


def test_an_unknown_certificate_is_refused(site):
    pem = os.environ.pop("SSL_CERT_FILE")
    try:
        with pytest.raises(UserError, match="(?i)certificate"): load_config(site+"/c.yml")
    finally: os.environ["SSL_CERT_FILE"] = pem


def test_http_is_refused():
    with pytest.raises(UserError, match="only https"): load_config("http://127.0.0.1/c.yml")


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::ffff:127.0.0.1", "192.168.0.1", "172.16.9.9", "fd00::1", "fe80::1", "localhost", "no.such.name.invalid", ""])
def test_private(host): assert is_private(host)
