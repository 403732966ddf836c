"""What runs inside a sandbox: takes Python code over a pipe, runs it, and says how it ended. Standard library only.

Never imported by the rest: rl/sandbox.py hands its text to the sandbox's own Python. It does what it is told until the
pipe ends. Nothing that it says can be trusted, since the code that it runs can say it as well. It imports what only
some code needs when that is needed: half of a short run is Python's own start.

    commands:  "ECHO LENGTH\n", then LENGTH bytes of code          answers:  "STATUS LIMIT\n", LIMIT being - for none

Before any code it says "ready\n" there.
"""

import errno
import os
import resource
import sys

LIMITS_BY_ERRNO = {
    errno.EMFILE: "open_files",
    errno.ENOSPC: "file_size",
    errno.EFBIG: "file_size",
    errno.EAGAIN: "processes",
    errno.ENOMEM: "memory",
}


class InstalledPackages:
    """Looks for what the standard library does not have. Python runs with -S: `site` is a third of its start."""

    def find_spec(self, name, path=None, target=None):
        sys.meta_path.remove(self)
        import site
        from importlib.machinery import PathFinder

        site.main()
        return PathFinder.find_spec(name, path)


def limit_of(error):
    """Which limit an error that ended the code comes from, if any."""
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, OSError):
        return LIMITS_BY_ERRNO.get(error.errno or 0)
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "processes"
    return None


def show(error, code, name):
    """The traceback, from the code's own first frame on."""
    import linecache
    import traceback

    linecache.cache[name] = len(code), None, code.splitlines(True), name
    where = error.__traceback__
    while where is not None and where.tb_frame.f_code.co_filename != name:
        where = where.tb_next
    traceback.print_exception(type(error), error, where)


def run(code, name, echo, variables):
    """(exit status, limit)"""
    try:
        if echo:
            import ast

            tree = ast.parse(code, name)
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, name, "exec"), variables)
            if last is not None:
                sys.displayhook(eval(compile(ast.Expression(last.value), name, "eval"), variables))
        else:
            exec(compile(code, name, "exec"), variables)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return (end.code % 256 if isinstance(end.code, int) else int(end.code is not None)), None
    except BaseException as error:
        show(error, code, name)
        return 1, limit_of(error)
    return 0, None


def flush(stream):
    try:
        stream.flush()
    except (OSError, ValueError):  # the code has closed it
        return


def main():
    commands, answers = int(sys.argv[1]), int(sys.argv[2])
    for limit in sys.argv[3].split(","):
        which, value = limit.split("=")
        resource.setrlimit(getattr(resource, which), (int(value), int(value)))
    for descriptor in (commands, answers):
        os.set_inheritable(descriptor, False)
    sys.meta_path.append(InstalledPackages())
    variables = {"__name__": "__main__", "__builtins__": __builtins__, "exit": sys.exit, "quit": sys.exit}
    calls, own = 0, os.getpid()
    os.write(answers, b"ready\n")
    with open(commands, "rb") as pipe:
        while header := pipe.readline():
            echo, length = map(int, header.split())
            calls += 1
            code = pipe.read(length).decode("utf-8", "replace")
            status, limit = run(code, f"<code {calls}>", echo, variables)
            flush(sys.stdout)
            flush(sys.stderr)
            if os.getpid() != own:  # a child that the code has forked
                os._exit(status)
            os.write(answers, f"{status} {limit or '-'}\n".encode())


main()
