"A hub on loopback: repositories in memory, as much of its interface as pushing and fetching files needs"
import base64, hashlib, json
from http.server import BaseHTTPRequestHandler


class Hub(BaseHTTPRequestHandler):
    "Subclass it, with `repos` and `log` of its own"
    repos, log, token, forbidden = None, None, "hf_secret", False # forbidden: the token may read, but not write

    def answer(self, status, body=b"", **headers):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for k, v in dict(Content_Length=str(len(body)), **headers).items(): self.send_header(k.replace("_", "-"), v)
        self.end_headers()
        if self.command!="HEAD": self.wfile.write(body)
    def missing(self, what): self.answer(404, dict(error=f"{what} not found"), X_Error_Code=f"{what}NotFound")
    def allowed(self): return self.headers.get("Authorization")==f"Bearer {self.token}"
    def parts(self):
        parts = self.path.split("?")[0].strip("/").split("/")
        kind = parts.pop(0) if parts[0] in ("datasets", "models") else "models"
        return kind, "/".join(parts[:2]), parts[2:]

    def do_POST(self):
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self.chunks()
        self.log.append(f"POST {self.path}")
        if not self.allowed(): return self.answer(401, dict(error="Invalid username or password."))
        if self.forbidden: return self.answer(403, dict(error="Forbidden: you don't have the rights to create a model under this namespace"))
        if self.path=="/api/validate-yaml": return self.answer(200, dict(errors=[], warnings=[])) # of cards; it takes all
        if self.path=="/api/repos/create":
            said = json.loads(body)
            repo = f"{said['organization']}/{said['name']}" if said.get("organization") else f"me/{said['name']}" # of whoever is logged in
            self.repos.setdefault((said.get("type") or "model", repo), dict(private=bool(said.get("private")) or said.get("visibility")=="private", files={}))
            return self.answer(200, dict(url=f"http://{self.headers['Host']}/{'datasets/'*(said.get('type')=='dataset')}{repo}"))
        kind, *name = self.path.removeprefix("/api/").split("?")[0].split("/")[:3]
        repo = self.repos[(kind.rstrip("s"), "/".join(name))]
        if "/preupload/" in self.path: return self.answer(200, dict(files=[dict(path=f["path"], uploadMode="regular", shouldIgnore=False) for f in json.loads(body)["files"]]))
        if "/branch/" in self.path: repo.setdefault("branches", {}).setdefault(self.path.rpartition("/")[2], {})
        if "/commit/" in self.path:
            branch = self.path.split("?")[0].rpartition("/")[2]
            files = repo["files"] if branch=="main" else repo.get("branches", {}).get(branch)
            if files is None: return self.missing("Revision")
            for line in map(json.loads, body.splitlines()):
                if line["key"]=="file": files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.answer(200, dict(commitUrl=f"http://{self.headers['Host']}/{'datasets/'*(kind=='datasets')}{'/'.join(name)}/commit/{'1'*40}", commitOid="1"*40, hookOutput=""))
        self.answer(200, {})
    def chunks(self):
        res = b""
        while n := int(self.rfile.readline(), 16): res += self.rfile.read(n); self.rfile.readline()
        self.rfile.readline()
        return res
    def do_GET(self):
        self.log.append(f"{self.command} {self.path}")
        if self.path.startswith("/api/"):
            parts = self.path.removeprefix("/api/").split("?")[0].split("/")
            repo = self.repos.get((parts[0].rstrip("s"), "/".join(parts[1:3])))
            return self.answer(200, dict(id="/".join(parts[1:3]), sha="1"*40, siblings=[dict(rfilename=n) for n in repo["files"]])) if repo and self.allowed() else self.missing("Repo")
        kind, name, rest = self.parts()
        repo = self.repos.get((kind.rstrip("s"), name))
        if not repo or not self.allowed(): return self.missing("Repo")
        body = repo["files"].get("/".join(rest[2:]))
        if body is None: return self.missing("Entry")
        self.answer(200, body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit="1"*40)
    do_HEAD = do_GET
    def log_message(self, *args): pass
