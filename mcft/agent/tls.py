"""TLS between agents, from the PKI files that libvirt has already.

Both sides show certificates of one CA; a certificate alone is not enough, its name must be a configured
peer's (`server.py` checks the client's, `peers.py` the server's).
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcft.config import Config
from mcft.errors import Failed, McftError, Refused

_HOW = "make libvirt's TLS certificates for this host (https://libvirt.org/kbase/tlscerts.html)"


def server_context(config: Config) -> ssl.SSLContext:
    """The context of the listening side; clients without a certificate of the CA are refused.

    Raises Refused("pki-missing") and Failed("pki-unusable"), both with the path.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load(context, config)
    return context


def client_context(config: Config) -> ssl.SSLContext:
    """The context of the calling side: shows libvirt's client certificate and checks the server's name.

    Raises Refused("pki-missing") and Failed("pki-unusable"), both with the path.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _load(context, config, config.client_cert, config.client_key)
    return context


def load(context: ssl.SSLContext, config: Config) -> None:
    """Read the server's files into `context` (again, after they were renewed: new connections use them).

    Raises what `server_context` raises.
    """
    _load(context, config, config.server_cert, config.server_key)


def peer_names(certificate: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The names in a verified certificate (`getpeercert()`): common name and DNS names, in lower case."""
    if not certificate:
        return ()
    subject = [value for rdn in certificate.get("subject", ()) for key, value in rdn if key == "commonName"]
    alternative = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]
    return tuple(dict.fromkeys(name.lower() for name in subject + alternative))


def _load(context: ssl.SSLContext, config: Config, certificate: Path, key: Path) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_mode = ssl.CERT_REQUIRED
    revoked = config.ca_cert.with_name("cacrl.pem")
    for path in (config.ca_cert, certificate, key):
        _readable(path)
    try:
        context.load_verify_locations(cafile=config.ca_cert)
        if revoked.exists():
            context.load_verify_locations(cafile=revoked)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    except (ssl.SSLError, OSError) as error:
        raise _unusable(config.ca_cert, error) from error
    try:
        # The password callback: OpenSSL would otherwise ask on the agent's terminal.
        context.load_cert_chain(certificate, key, password="")
    except (ssl.SSLError, OSError) as error:
        raise _unusable(certificate, error, f" with its key {key}") from error


def _readable(path: Path) -> None:
    try:
        with path.open("rb"):
            pass
    except (FileNotFoundError, NotADirectoryError):
        raise Refused("pki-missing", f"{path} does not exist", "agents talk over TLS only", _HOW) from None
    except OSError as error:
        raise Failed("pki-unusable", f"{path} cannot be read", str(error), "make it readable for root") from error


def _unusable(path: Path, error: Exception, detail: str = "") -> McftError:
    return Failed("pki-unusable", f"{path}{detail} cannot be used", str(error), _HOW)
