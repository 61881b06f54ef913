"""Creates the missing Secrets of a release. A Job runs this program in the image before an installation and before each
upgrade. Therefore no manifest contains keys, and Helm keeps no keys in its history."""

from __future__ import annotations

import argparse
import base64
import json
import secrets
import ssl
import sys
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from llamaclust.cluster.membership.authority import Authority
from llamaclust.wire.security.certificates import ca_hash
from llamaclust.wire.security.token import JoinToken

_TIMEOUT_S = 20.0
_NOT_FOUND, _CONFLICT = 404, 409


@dataclass(frozen=True, slots=True)
class SecretStore:
    """The Secrets of one namespace, through the Kubernetes API."""

    api: str
    account: Path  # Folder with the service account's token and the API's ca.crt.
    namespace: str
    labels: dict[str, str]

    def read(self, name: str) -> dict[str, str] | None:
        """Returns the decoded data of a Secret, or None if the Secret does not exist."""
        try:
            data = self._call(f"/{name}", None)["data"]
        except HTTPError as error:
            if error.code == _NOT_FOUND:
                return None
            raise
        return {key: base64.b64decode(value).decode() for key, value in data.items()}

    def create(self, name: str, data: dict[str, str]) -> bool:
        """Creates a Secret. Returns False if the Secret exists, and leaves it unchanged."""
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "labels": self.labels},
            "type": "Opaque",
            "stringData": data,
        }
        try:
            self._call("", json.dumps(secret).encode())
        except HTTPError as error:
            if error.code == _CONFLICT:
                print(f"{name}: kept")
                return False
            raise
        print(f"{name}: made")
        return True

    def _call(self, path: str, body: bytes | None) -> dict[str, dict[str, str]]:
        url = f"{self.api}/api/v1/namespaces/{self.namespace}/secrets{path}"
        token = (self.account / "token").read_text()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        tls = ssl.create_default_context(cafile=self.account / "ca.crt") if url.startswith("https:") else None
        # The cluster's own API server is not behind a proxy that the environment names.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=tls))
        with opener.open(urllib.request.Request(url, body, headers), None, _TIMEOUT_S) as reply:
            found: dict[str, dict[str, str]] = json.load(reply)
        return found


def make_trust(store: SecretStore, authority: str, join: str) -> None:
    """Creates two Secrets: the certificate authority's key for the coordinator, and the join token for workers."""
    kept = store.read(authority)
    if kept is not None:
        certificate = x509.load_pem_x509_certificate(kept["ca.crt"].encode())
        store.create(join, {"token": JoinToken.create(ca_hash(certificate.public_bytes(Encoding.DER))).text})
        return
    with tempfile.TemporaryDirectory() as folder:
        trust = Path(folder) / "trust"
        token = Authority.open(trust).token.text
        made = {name: (trust / name).read_text() for name in ("ca.crt", "ca.key")}
    if store.create(authority, made):
        store.create(join, {"token": token})


def main() -> None:
    parser = argparse.ArgumentParser()
    for option in ("api", "account", "namespace", "labels"):
        parser.add_argument(f"--{option}", required=True)
    for option in ("authority", "join", "keys", "ray"):
        parser.add_argument(f"--{option}", metavar="SECRET")
    given = parser.parse_args()
    store = SecretStore(given.api, Path(given.account), given.namespace, json.loads(given.labels))
    try:
        if given.join:
            make_trust(store, given.authority, given.join)
        if given.keys:
            key = secrets.token_urlsafe(32)
            store.create(given.keys, {"api-keys": key, "api-key": key})
        if given.ray:
            store.create(given.ray, {"auth_token": secrets.token_urlsafe(32)})
    except OSError as error:
        sys.exit(f"error: no Secrets can be made in namespace {given.namespace}: {error}")


if __name__ == "__main__":
    main()
