"""Real programs that plugins ask, for tests: Debian's rspamd and postgrey.

Each runs with a configuration and data in a temporary directory. rspamd has one rule, made for
tests: the score stands in the subject (`score=7`), and `soft` in it is a soft reject.
"""

import grp
import os
import pwd
import socket
import urllib.request
from pathlib import Path

from tests.postfix import program
from tests.services import ServerProcess, free_port, temporary_directory

_RSPAMD = """\
options {{
  pidfile = "{directory}/pid"; tempdir = "{directory}"; cache_file = "{directory}/symbols.cache";
  control_socket = "{directory}/control mode=0600"; hs_cache_dir = "{directory}";
  url_tld = "{directory}/tld"; filters = ""; dns {{ nameserver = ["127.0.0.1:9"]; }}
}}
logging {{ type = "console"; level = "notice"; }}
worker "normal" {{ bind_socket = "127.0.0.1:{port}"; count = 1; }}
actions {{ reject = 15; rewrite_subject = 8; add_header = 6; greylist = 4; }}
lua = "{directory}/rules.lua";
"""
_RULES = """\
rspamd_config:register_symbol({
  name = 'TEST_SUBJECT', score = 1.0,
  callback = function(task)
    local subject = task:get_header('Subject') or ''
    if subject:match('soft') then task:set_pre_result('soft reject', 'Come back later') end
    local rcpt = task:get_recipients('smtp')
    task:set_milter_reply({add_headers = {
      ['X-Seen'] = string.format('%s %s %s %s %d %d', task:get_from_ip():to_string(),
        task:get_helo(), task:get_from('smtp')[1].addr, rcpt[1].addr, #rcpt, task:get_size()),
      ['X-Twice'] = {{value = 'one', order = 1}, {value = 'two', order = 1}},
      ['X-Long'] = string.rep('x', 2000),
    }})
    return true, tonumber(subject:match('score=([%d.]+)') or '0')
  end })
"""


class Rspamd(ServerProcess):
    """rspamd with one worker, without DNS and statistics."""

    def __init__(self) -> None:
        super().__init__(temporary_directory())
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        configuration = _RSPAMD.format(directory=self.directory, port=self.port)
        (self.directory / "rspamd.conf").write_text(configuration)
        (self.directory / "rules.lua").write_text(_RULES)
        (self.directory / "tld").write_text("com\nexample\norg\n")

    def _command(self) -> list[str]:
        return [program("rspamd"), "-f", "-i", "-c", str(self.directory / "rspamd.conf")]

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/ping", timeout=5) as reply:
                return bool(reply.read() == b"pong\r\n")
        except OSError:
            return False


class Postgrey(ServerProcess):
    """postgrey, which asks to wait for a second; on a port, or on the Unix socket `path`."""

    def __init__(self, *, unix: bool = False) -> None:
        super().__init__(temporary_directory())
        self.port = free_port()
        self.path = self.directory / "socket" if unix else None
        self.address = f"unix:{self.path}" if unix else f"127.0.0.1:{self.port}"

    def _command(self) -> list[str]:
        user, group = pwd.getpwuid(os.getuid()).pw_name, grp.getgrgid(os.getgid()).gr_name
        listen = f"--unix={self.path}" if self.path else f"--inet=127.0.0.1:{self.port}"
        nothing = Path(os.devnull)
        return [
            program("postgrey"),
            listen,
            f"--dbdir={self.directory}",
            f"--pidfile={self.directory}/pid",
            f"--user={user}",
            f"--group={group}",
            "--delay=1",
            f"--whitelist-clients={nothing}",
            f"--whitelist-recipients={nothing}",
        ]

    def _answers(self) -> bool:
        family = socket.AF_UNIX if self.path else socket.AF_INET
        with socket.socket(family) as client:
            target = str(self.path) if self.path else ("127.0.0.1", self.port)
            return client.connect_ex(target) == 0
