"""gRPC's credentials of the server. New connections use the TLS files as they are on the disk now."""

from __future__ import annotations

import logging

import grpc

from loraf_serve.security.changes import Changes
from loraf_serve.security.tls_files import TlsFiles

log = logging.getLogger(__name__)


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """gRPC's credentials. While the files on the disk cannot be used, those before them stay in use."""
    changes = Changes(files.paths)

    def changed() -> grpc.ServerCertificateConfiguration | None:  # by gRPC's thread, for every new connection
        try:
            if not changes.seen():
                return None
            problems = files.problems()  # a certificate and the key of another may be seen while both are replaced
            if problems:
                changes.forget()
                log.error("the TLS files have changed and cannot be used yet: %s", problems[0])
                return None
            configuration = _configuration(files)
        except Exception:  # an exception here would refuse the connection
            log.exception("the TLS files could not be read again")
            return None
        log.info("the TLS files were read again")
        return configuration

    required = files.client_authority is not None
    credentials: grpc.ServerCredentials = grpc.dynamic_ssl_server_credentials(
        _configuration(files),
        changed,  # type: ignore[arg-type]  # None means no change
        required,
    )
    return credentials


def _configuration(files: TlsFiles) -> grpc.ServerCertificateConfiguration:
    pair = (files.key.read_bytes(), files.certificate.read_bytes())
    authority = files.client_authority.read_bytes() if files.client_authority else None
    return grpc.ssl_server_certificate_configuration([pair], authority)
