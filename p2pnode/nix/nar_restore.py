"""Unpacking a NAR stream into a tree, and taking such a tree away again.

Everything is created exclusively (O_EXCL, mkdir, symlink) below descriptors of directories that were made a moment
before, so no name in an archive and nobody who writes into the tree meanwhile can lead a write outside of it
(CVE-2024-45593 was that). Blocking calls: for worker threads.
"""

from __future__ import annotations

import errno
import os
import stat
from types import TracebackType
from typing import Self

from p2pnode.errors import OutputExists, PathError
from p2pnode.nix import nar_format as fmt
from p2pnode.nix.nar_reader import Buffer, NarReader
from p2pnode.nix.nar_walk import DIRECTORY_FLAGS, AnyPath, root_bytes

_CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_STORE_TIME = (10**9, 10**9)  # atime, mtime in ns: one second after the epoch, as in every Nix store


class NarRestorer:
    """Writes the tree that a NAR describes to `destination`, which must not exist; its parent must.

    Modes are 0666 or 0777 less the umask; with `store_modes`, those of a Nix store: 0444 or 0555, mtime 1. (Who is
    not root can rename such a directory within its parent only.) Nothing is created before the NAR's first node was
    read. As a context manager it aborts unless `finish` was reached.
    """

    def __init__(self, destination: AnyPath, *, store_modes: bool = False, max_size: int = fmt.MAX_SIZE) -> None:
        """Raises OutputExists, PathError (no such parent directory), OutputUnwritable."""
        path = os.path.abspath(root_bytes(destination))
        parent, name = os.path.split(path)
        if not name:
            raise OutputExists(f"{fmt.shown(path)} exists already")
        try:
            parent_fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            raise PathError(f"{fmt.shown(parent)} is not a directory, so nothing can be written into it") from None
        except OSError as error:
            raise fmt.write_error(parent, error) from error
        self._writer = _TreeWriter(path, parent_fd, name, store_modes)
        self._reader = NarReader(self._writer, max_size=max_size)
        try:
            os.lstat(path)
        except OSError:
            return  # not there, or told by the creating call
        self._writer.close()
        raise OutputExists(f"{fmt.shown(path)} exists already; choose another output or pass --force")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    @property
    def size(self) -> int:
        """Bytes of the NAR fed so far."""
        return self._reader.size

    def feed(self, data: Buffer) -> None:
        """Write what these bytes describe.

        Raises NarError (a bad NAR), DiskFull, OutputUnwritable, OutputExists, StoreError; call `abort` then.
        """
        self._reader.feed(data)

    def finish(self) -> None:
        """Say that the stream has ended. Raises NarError if the NAR is incomplete; call `abort` then.

        Nothing is forced to disk (fsync of 10,000 files costs more than the download): a caller that records
        the tree as complete checks it after a crash, or syncs the file system first.
        """
        self._reader.close()
        self._writer.close()

    def abort(self) -> None:
        """Close everything and remove all that was created. Does nothing after `finish` or a second time."""
        self._writer.abort()


class _TreeWriter:
    """The visitor that creates what a NarReader tells."""

    def __init__(self, path: bytes, parent_fd: int, name: bytes, store_modes: bool) -> None:
        self._path = path
        self._name = name
        self._store_modes = store_modes
        self._directories = [parent_fd]  # descriptors, the output's parent first
        self._names: list[bytes] = []  # of the open directories, the root's is b""
        self._file = -1
        self._file_name = b""
        self._executable = False
        self._created: tuple[int, int] | None = None  # device and inode of the root that is ours to remove

    def enter_directory(self, name: bytes) -> None:
        parent = self._directories[-1]
        entry = name or self._name
        try:
            os.mkdir(entry, 0o777, dir_fd=parent)
            if not name:  # before open() can fail, or abort would leave the directory behind
                self._own(os.stat(entry, dir_fd=parent, follow_symlinks=False))
            self._directories.append(os.open(entry, DIRECTORY_FLAGS, dir_fd=parent))
            self._names.append(name)
        except OSError as error:
            raise self._error(name, error) from error

    def leave_directory(self) -> None:
        fd = self._directories.pop()
        name = self._names.pop()
        try:
            if self._store_modes:
                os.fchmod(fd, 0o555)
                os.utime(fd, ns=_STORE_TIME)
        except OSError as error:
            raise self._error(name, error) from error
        finally:
            os.close(fd)

    def begin_file(self, name: bytes, executable: bool, size: int) -> None:
        self._file_name = name
        self._executable = executable
        try:
            mode = 0o777 if executable else 0o666
            self._file = os.open(name or self._name, _CREATE_FLAGS, mode, dir_fd=self._directories[-1])
            if not name:
                self._own(os.fstat(self._file))
        except OSError as error:
            raise self._error(name, error) from error

    def file_contents(self, data: memoryview) -> None:
        try:
            written = os.write(self._file, data)
            while written < len(data):  # a nearly full disk takes a part and refuses the next write
                written += os.write(self._file, data[written:])
        except OSError as error:
            raise self._error(self._file_name, error) from error

    def end_file(self) -> None:
        fd, self._file = self._file, -1
        try:
            try:
                if self._store_modes:
                    os.fchmod(fd, 0o555 if self._executable else 0o444)
                    os.utime(fd, ns=_STORE_TIME)
            finally:
                os.close(fd)
        except OSError as error:  # close() too: some file systems report a full disk only there
            raise self._error(self._file_name, error) from error

    def symlink(self, name: bytes, target: bytes) -> None:
        entry = name or self._name
        parent = self._directories[-1]
        try:
            os.symlink(target, entry, dir_fd=parent)
            if not name:
                self._own(os.stat(entry, dir_fd=parent, follow_symlinks=False))
            if self._store_modes:
                os.utime(entry, ns=_STORE_TIME, dir_fd=parent, follow_symlinks=False)
        except OSError as error:
            raise self._error(name, error) from error

    def close(self) -> None:
        """Give up all descriptors; what was created stays."""
        self._created = None
        self._close_all()

    def abort(self) -> None:
        if not self._directories:
            return
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        while len(self._directories) > 1:
            os.close(self._directories.pop())
        try:
            self._remove_created()
        finally:
            self._close_all()

    def _remove_created(self) -> None:
        parent = self._directories[0]
        try:
            status = os.stat(self._name, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return
        except OSError as error:
            raise fmt.write_error(self._path, error) from error
        if self._created == (status.st_dev, status.st_ino):  # else someone else's: leave it
            _remove(self._path, self._name, parent)

    def _close_all(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        while self._directories:
            os.close(self._directories.pop())

    def _own(self, status: os.stat_result) -> None:
        self._created = (status.st_dev, status.st_ino)

    def _error(self, name: bytes, error: OSError) -> Exception:
        path = b"/".join(part for part in (self._path, *self._names, name) if part)
        if error.errno == errno.EEXIST and not name:
            return OutputExists(f"{fmt.shown(path)} exists already; choose another output or pass --force")
        return fmt.write_error(path, error)


def remove_tree(path: AnyPath) -> None:
    """Remove a file, symlink or directory tree, read-only directories of ours included; nothing is followed.

    No recursion. Nothing at `path` is no error. Raises OutputUnwritable or StoreError.
    """
    full = os.path.abspath(root_bytes(path))
    parent, name = os.path.split(full)
    try:
        parent_fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError as error:
        raise fmt.write_error(parent, error) from error
    try:
        _remove(full, name, parent_fd)
    finally:
        os.close(parent_fd)


def _remove(path: bytes, name: bytes, parent_fd: int) -> None:
    # Whatever is below may be deeper than there are descriptors: only the innermost directory is open, and the way up
    # is "..", checked to lead where we came from.
    names: list[bytes] = []  # of the directories on the way down
    waiting: list[list[bytes]] = []  # entries still to be removed, per directory
    above: list[tuple[int, int]] = []  # device and inode of each one's parent
    fd = os.dup(parent_fd)
    entry = name
    try:
        while True:
            if not _unlink_leaf(entry, fd):
                status = os.fstat(fd)
                child = os.open(entry, DIRECTORY_FLAGS, dir_fd=fd)
                os.close(fd)
                fd = child
                names.append(entry)
                above.append((status.st_dev, status.st_ino))
                if os.fstat(fd).st_mode & stat.S_IRWXU != stat.S_IRWXU:
                    os.fchmod(fd, stat.S_IRWXU)  # entries of a read-only directory cannot be unlinked
                waiting.append(list(map(os.fsencode, os.listdir(fd))))
            while waiting and not waiting[-1]:
                parent = os.open("..", DIRECTORY_FLAGS, dir_fd=fd)
                os.close(fd)
                fd = parent
                status = os.fstat(fd)
                if (status.st_dev, status.st_ino) != above.pop():
                    raise OSError(errno.EBUSY, "moved while it was being removed")
                waiting.pop()
                entry = names.pop()
                os.rmdir(entry, dir_fd=fd)
            if not waiting:
                return
            entry = waiting[-1].pop()
    except OSError as error:
        raise fmt.write_error(os.path.join(os.path.dirname(path), *names, entry), error) from error
    finally:
        os.close(fd)


def _unlink_leaf(name: bytes, dir_fd: int) -> bool:
    """Remove anything but a directory; True if nothing is left to do."""
    try:
        os.unlink(name, dir_fd=dir_fd)
    except FileNotFoundError:
        return True
    except OSError as error:
        # Linux says EISDIR, POSIX says EPERM.
        if error.errno not in (errno.EISDIR, errno.EPERM):
            raise
        if not stat.S_ISDIR(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode):
            raise
        return False
    return True
