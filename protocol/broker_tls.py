"""What a rediss:// URL says of TLS, checked before Celery and redis-py read it, each in its own way."""

from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from protocol.errors import ConfigurationError

SCHEME = "rediss"
_SHAPE = "rediss://:password@host:6379/0?ssl_cert_reqs=required&ssl_ca_certs=/path/to/ca.pem"
_VERIFYING = ("required", "optional", "none")
_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_OPTIONS = ("ssl_cert_reqs", *_FILES, "ssl_check_hostname", "ssl_password")


def check_tls(broker_url: str) -> None:
    """Raises ConfigurationError, without the URL in it, for options of TLS that cannot work."""
    parts = urlsplit(broker_url)
    options = {name: value for name, value in parse_qsl(parts.query) if name.startswith("ssl_")}
    if parts.scheme != SCHEME:
        if options:
            raise ConfigurationError(
                f"broker_url has {', '.join(options)} and is of the kind {parts.scheme}, which speaks no TLS: it must "
                f"look like {_SHAPE}"
            )
        return
    if unknown := sorted(options.keys() - set(_OPTIONS)):
        raise ConfigurationError(
            f"broker_url has unknown options: {', '.join(unknown)}; those of TLS are {', '.join(_OPTIONS)}"
        )
    if (verifying := options.get("ssl_cert_reqs")) not in _VERIFYING:
        said = "no ssl_cert_reqs" if verifying is None else f"ssl_cert_reqs={verifying}"
        raise ConfigurationError(
            f"broker_url has {said}, which says how the server's certificate is checked: it must be one of "
            f"{', '.join(_VERIFYING)}, as in {_SHAPE}"
        )
    for name in _FILES:
        if name in options and not Path(options[name]).is_file():
            raise ConfigurationError(f"broker_url has {name}={options[name]}, and there is no such file")
    if "ssl_keyfile" in options and "ssl_certfile" not in options:
        raise ConfigurationError("broker_url has ssl_keyfile without ssl_certfile: name the certificate too")
