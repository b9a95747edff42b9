"""Certificates for tests: an authority, and pairs that it signs, as the files of an operator."""

import shutil
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme


class Authority:
    """A certificate authority in a directory; `bundle` is the file that clients verify with."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._name = name
        self._ca = trustme.CA(organization_name=name)
        self.directory = directory
        self.bundle = directory / f"{name}.pem"
        self._ca.cert_pem.write_to_path(str(self.bundle))

    def sign(self, *names: str, days: float = 90, common_name: str | None = None) -> "SignedPair":
        """A new pair for these names."""
        issued = self._ca.issue_cert(
            *names,
            common_name=common_name,
            organization_name=self._name,
            not_before=datetime.now(UTC) - timedelta(days=100),
            not_after=datetime.now(UTC) + timedelta(days=days),
        )
        return SignedPair(issued)

    def client_context(self, pair: "tuple[Path, Path] | None" = None) -> ssl.SSLContext:
        """A client that trusts this authority alone, and presents the pair."""
        context = ssl.create_default_context(cafile=str(self.bundle))
        if pair is not None:
            context.load_cert_chain(*pair)
        return context


class SignedPair:
    """A certificate with its chain, and its key."""

    def __init__(self, issued: trustme.LeafCert) -> None:
        self._issued = issued

    def write(self, directory: Path) -> tuple[Path, Path]:
        """Writes chain.pem and key.pem as a renewal does: by renames."""
        directory.mkdir(exist_ok=True)
        chain = b"".join(blob.bytes() for blob in self._issued.cert_chain_pems)
        files = {"chain.pem": chain, "key.pem": self._issued.private_key_pem.bytes()}
        for name, content in files.items():
            new = directory / f"{name}.new"
            new.write_bytes(content)
            new.chmod(0o600)
            shutil.move(new, directory / name)
        return directory / "chain.pem", directory / "key.pem"
