"Tab in a shell: commands, options and the words that an option accepts."
import fcntl
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
import time
from functools import partial
from pathlib import Path

import pytest


def environment(tmp_path):
    "An environment in which `fastsmile` is this package"
    bin = tmp_path/'bin'
    bin.mkdir()
    (bin/'fastsmile').write_text(f'#!{sys.executable}\nfrom fastsmile.cli.commands import main\nmain()\n')
    (bin/'fastsmile').chmod(0o755)
    return os.environ | dict(PATH=f'{bin}:{os.environ["PATH"]}', TERM='dumb', HOME=str(tmp_path), PS1='$ ', PROMPT_COMMAND='')


class Terminal:
    "A shell in a pseudo-terminal, typed into"
    def __init__(self, *words, env):
        self.fd, slave = pty.openpty()
        own = partial(fcntl.ioctl, slave, termios.TIOCSCTTY, 0)  # fish ends where the terminal is not its own
        self.process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True, preexec_fn=own)
        os.close(slave)

    def type(self, keys, until, seconds=60):
        "Type, and wait until the terminal shows a pattern; what it has shown since"
        shown, end = '', time.monotonic() + seconds
        os.write(self.fd, keys.encode())
        while time.monotonic() < end and not re.search(until, shown):
            if select.select([self.fd], [], [], 0.2)[0]: shown += os.read(self.fd, 4096).decode(errors='replace')
        assert re.search(until, shown), f'{keys!r} shows {shown!r}'
        return shown

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.fd)


SHELLS = dict(bash=(('bash', '--norc', '--noprofile', '-i'), 'eval "$(_FASTSMILE_COMPLETE=source_bash fastsmile)"; echo rea""dy\n'),
              zsh=(('zsh', '-f', '-i'), 'autoload -Uz compinit; compinit -u; eval "$(_FASTSMILE_COMPLETE=source_zsh fastsmile)"; echo rea""dy\n'),
              fish=(('fish', '--no-config', '-i'), '_FASTSMILE_COMPLETE=source_fish fastsmile | source; echo rea""dy\n'))


@pytest.mark.parametrize('name', SHELLS)
def test_tab_completes_commands_options_and_words(name, tmp_path):
    if not shutil.which(name): pytest.skip(f'{name} is not installed')
    words, prepare = SHELLS[name]
    shell = Terminal(*words, env=environment(tmp_path))
    try:
        shell.type(prepare, 'ready')
        assert 'fastsmile fit' in shell.type('fastsmile fi\t', r'fastsmile fit')
        assert 'faces --arch' in shell.type('faces --ar\t', r'faces --arch')
        assert re.search(r'argm\W*ax', shell.type('x --decide argm\t', r'argm\W*ax'))
    finally: shell.close()


@pytest.mark.parametrize('typed,expected', [('fastsmile fi', ['fit']), ('fastsmile fit --ar', ['--arch']), ('fastsmile fit --precision f', ['fp32', 'fp16']),
                                            ('fastsmile predict --engine ', ['auto', 'torch', 'onnx'])])
def test_what_a_shell_is_given(typed, expected, tmp_path):
    env = environment(tmp_path) | dict(COMP_WORDS=typed, COMP_CWORD=str(typed.count(' ')), _FASTSMILE_COMPLETE='complete_bash')
    r = subprocess.run([Path(tmp_path)/'bin'/'fastsmile'], env=env, capture_output=True, text=True)
    assert r.stdout.split() == expected
    fish = env | dict(_TYPER_COMPLETE_ARGS=typed, _TYPER_COMPLETE_FISH_ACTION='get-args', _FASTSMILE_COMPLETE='complete_fish')
    r = subprocess.run([Path(tmp_path)/'bin'/'fastsmile'], env=fish, capture_output=True, text=True)
    assert [line.split('\t')[0] for line in r.stdout.splitlines()] == expected
    r = subprocess.run([Path(tmp_path)/'bin'/'fastsmile'], env=fish | dict(_FASTSMILE_COMPLETE='complete_zsh'), capture_output=True, text=True)
    assert all(f'"{word}"' in r.stdout for word in expected)
