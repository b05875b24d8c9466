"Python programs in forks of a process that has imported torch and fastai already: hundreds of programs need not import them each"
import atexit
import functools
import importlib.machinery
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

# of other projects alone: fastsmile itself is imported by each program
IMPORTED = ['torch', 'timm', 'fastai.vision.all', 'pandas', 'sklearn.ensemble', 'matplotlib.figure']


class Forgotten:
    "Modules of some packages, gone from `sys.modules` until they are imported"

    def __init__(self, packages: tuple[str, ...]):
        self.modules = {n: sys.modules.pop(n) for n in list(sys.modules) if n.partition('.')[0] in packages}

    def find_spec(self, name, path=None, target=None): return importlib.machinery.ModuleSpec(name, self) if name in self.modules else None

    def create_module(self, spec):
        self.spec = self.modules[spec.name].__spec__
        return self.modules[spec.name]

    def exec_module(self, module): module.__spec__ = self.spec


def _run(program: list[str], cwd: str, env: dict[str, str]):
    "What `python -m fastsmile ARGS`, `python -c CODE ARGS` or `python SCRIPT ARGS` does"
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = program
    if program[0] == '-m':
        sys.argv = program[1:]
        runpy.run_module(program[1], run_name='__main__', alter_sys=True)
    elif program[0] == '-c':
        sys.argv = ['-c', *program[2:]]
        exec(compile(program[1], '<code>', 'exec'), dict(__name__='__main__'))
    else:
        sys.path.insert(0, str(Path(program[0]).parent))
        runpy.run_path(program[0], run_name='__main__')


class ForkingPopen(subprocess.Popen):
    "In a fork: Python programs that it starts are forks, too; exit functions stay with the one that registered them"

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                       p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *more):
        program = [*map(str, args)] if not isinstance(args, str) else [args]
        if program[:1] != [sys.executable]:
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
                                          p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *more)
        program = program[3 if program[1] == '-W' else 1:]
        for stream in (sys.stdout, sys.stderr): stream.flush()
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            return self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)
        for fd, theirs in enumerate((p2cread, c2pwrite, errwrite)):
            if theirs != -1: os.dup2(theirs, fd)
        code = 1
        try: _run(program, cwd or os.getcwd(), dict(env or os.environ))
        except SystemExit as e: code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException: traceback.print_exc()
        else: code = 0
        finally:
            for stream in (sys.stdout, sys.stderr): stream.flush()
            os._exit(code)


def _main(program: list[str], files: Path, cwd: str, env: dict[str, str], forget: tuple[str, ...], forks: bool):
    "In the fork: the program, with its streams in files"
    sys.meta_path.insert(0, Forgotten(forget))
    os.setsid()  # a process group of its own, on which Ctrl-C works
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for n, name in enumerate(('stdin', 'stdout', 'stderr')):
        fd = os.open(files/name, os.O_WRONLY | os.O_CREAT if n else os.O_RDONLY)
        os.dup2(fd, n)
        os.close(fd)
    sys.stdin = os.fdopen(0, closefd=False)  # multiprocessing has put another in its place
    multiprocessing.set_start_method(None, force=True)  # the program's own processes start as they do elsewhere
    if forks: subprocess.Popen = ForkingPopen
    try: _run(program, cwd, env)
    finally: atexit._run_exitfuncs()  # multiprocessing does not


@functools.cache
def _server() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(IMPORTED)
    return context


class Program:
    "A running program, asked as a `subprocess.Popen` is"

    def __init__(self, program: list, cwd=None, env=None, stdin: str = '', forget: tuple[str, ...] = (), forks: bool = False):
        self.args, self.folder = list(map(str, program)), tempfile.TemporaryDirectory()
        self.files = Path(self.folder.name)
        for name, text in dict(stdin=stdin, stdout='', stderr='').items(): (self.files/name).write_text(text)
        self.process = _server().Process(target=_main, args=(self.args, self.files, str(cwd or os.getcwd()), dict(env or os.environ), forget, forks))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None: return self.process.exitcode
    def poll(self) -> int | None: return self.process.exitcode
    def kill(self): self.process.kill()
    def said(self, name: str) -> str: return (self.files/name).read_text(errors='replace')

    def communicate(self, timeout: float | None = None) -> tuple[str, str]: # stdout, stderr
        "Wait for its end"
        self.process.join(timeout)
        if self.process.exitcode is None: raise subprocess.TimeoutExpired(self.args, timeout)
        return self.said('stdout'), self.said('stderr')


def run_python(program: list, cwd=None, env=None, stdin: str = '', timeout: float = 600, forget: tuple[str, ...] = (),
               forks: bool = False) -> subprocess.CompletedProcess:
    """Exit code and output of a program: `-m` and a module, `-c` and code, or a script, and its arguments

    Modules of packages to `forget` are in `sys.modules` only where the program imports them itself.
    With `forks` the Python programs that it starts are forks of it."""
    p = Program(program, cwd, env, stdin, forget, forks)
    try: said = p.communicate(timeout)
    except subprocess.TimeoutExpired:
        p.kill()
        raise
    return subprocess.CompletedProcess(p.args, p.returncode, *said)
