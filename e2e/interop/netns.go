package main

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// The magic number of the file system that holds namespace files (statfs(2)).
const nsfsMagic = 0x6e736673

// enterNamespace starts this program again inside a network namespace. A namespace belongs to a thread and Go moves
// goroutines between threads; exec makes the thread that entered the only one.
func enterNamespace(path string, args []string) error {
	namespace, err := os.Open(path)
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	if err := unix.Setns(int(namespace.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("setns %s: %w", path, err)
	}
	return unix.Exec(self, append([]string{os.Args[0]}, args...), os.Environ())
}

// describeNamespace says what a received descriptor is, so that a test can compare it with the pod's namespace file.
func describeNamespace(fd int) (fields, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(fd, &stat); err != nil {
		return nil, fmt.Errorf("fstat: %w", err)
	}
	var filesystem unix.Statfs_t
	if err := unix.Fstatfs(fd, &filesystem); err != nil {
		return nil, fmt.Errorf("fstatfs: %w", err)
	}
	kind := "other"
	if filesystem.Type == nsfsMagic {
		if nstype, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE); err == nil && nstype == unix.CLONE_NEWNET {
			kind = "network namespace"
		}
	}
	return fields{"device": stat.Dev, "inode": stat.Ino, "kind": kind}, nil
}
