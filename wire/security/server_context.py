from __future__ import annotations

import ssl
import tempfile
from pathlib import Path


def server_context(pem: bytes, minimum: ssl.TLSVersion) -> ssl.SSLContext:
    """Returns a TLS context with the certificates and the private key in `pem`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = minimum
    context.options |= ssl.OP_NO_RENEGOTIATION
    # Python can load a key only from a file.
    with tempfile.TemporaryDirectory(prefix="llamaclust-") as folder:
        path = Path(folder) / "pair"
        path.touch(mode=0o600)
        path.write_bytes(pem)
        context.load_cert_chain(path)
    return context
