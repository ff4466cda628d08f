package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"istio.io/istio/pkg/zdsapi"
)

const (
	zdsMaxMessage = 1024            // one packet (C64)
	zdsDeadline   = 5 * time.Second // for one read or write (C64)
)

// zdsPod is what the agent remembers of a pod: to tell a proxy that connects later.
type zdsPod struct {
	info      *zdsapi.WorkloadInfo
	namespace *os.File // nil makes it a Keep
}

// zdsServer is a node agent driven by standard input.
type zdsServer struct {
	lock        sync.Mutex
	order       []string
	pods        map[string]zdsPod
	connections []*net.UnixConn // oldest first; adds go to the last, deletes to all (C65)
	manual      bool
}

func runServeZDS(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("serve-zds", flag.ContinueOnError)
	path := flags.String("socket", "", "SOCK_SEQPACKET socket to listen on")
	manual := flags.Bool("manual", false, "send nothing on connect: the snapshot is driven by standard input too")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if err := required(flags, "socket"); err != nil {
		return err
	}
	if err := os.Remove(*path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	listener, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: *path, Net: "unixpacket"})
	if err != nil {
		return err
	}
	defer listener.Close()
	server := &zdsServer{pods: map[string]zdsPod{}, manual: *manual}
	emit("listening", fields{"socket": *path})
	go server.acceptAll(listener)
	for {
		select {
		case <-ctx.Done():
			return nil
		case words, open := <-stdinOnce(ctx):
			if !open {
				return nil
			}
			if err := server.command(words); err != nil {
				emit("command-failed", fields{"command": strings.Join(words, " "), "message": err.Error()})
			}
		}
	}
}

var stdinOnce = func() func(context.Context) <-chan []string {
	var once sync.Once
	var lines <-chan []string
	return func(ctx context.Context) <-chan []string {
		once.Do(func() { lines = stdinCommands(ctx) })
		return lines
	}
}()

func (s *zdsServer) acceptAll(listener *net.UnixListener) {
	for {
		connection, err := listener.AcceptUnix()
		if err != nil {
			return
		}
		if err := s.welcome(connection); err != nil {
			emit("connection-failed", fields{"message": err.Error()})
			connection.Close()
		}
	}
}

// welcome reads the hello, tells the proxy everything known, and ends the snapshot.
func (s *zdsServer) welcome(connection *net.UnixConn) error {
	hello := &zdsapi.ZdsHello{}
	if err := receive(connection, hello); err != nil {
		return fmt.Errorf("hello: %w", err)
	}
	emit("hello", fields{"version": hello.Version.String()})
	if hello.Version != zdsapi.Version_V1 {
		return fmt.Errorf("hello of version %v", hello.Version)
	}
	s.lock.Lock()
	defer s.lock.Unlock()
	s.connections = append(s.connections, connection)
	if s.manual {
		return nil
	}
	for _, uid := range s.order {
		if err := s.announce(connection, uid); err != nil {
			return err
		}
	}
	return s.snapshot(connection)
}

func (s *zdsServer) command(words []string) error {
	s.lock.Lock()
	defer s.lock.Unlock()
	switch {
	case words[0] == "add" && len(words) == 6:
		return s.add(words[1], words[2], words[3], words[4], words[5])
	case words[0] == "keep" && len(words) == 2:
		s.remember(words[1], zdsPod{})
		return s.toNewest(func(connection *net.UnixConn) error { return s.announce(connection, words[1]) })
	case words[0] == "del" && len(words) == 2:
		return s.del(words[1])
	case words[0] == "snapshot" && len(words) == 1:
		return s.toNewest(s.snapshot)
	case words[0] == "disconnect" && len(words) == 1:
		for _, connection := range s.connections {
			connection.Close()
		}
		s.connections = nil
		return nil
	}
	return errors.New("not one of: add UID NAMESPACE NAME SERVICE_ACCOUNT NETNS, keep UID, del UID, snapshot, disconnect")
}

func (s *zdsServer) add(uid, namespace, name, account, path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	info := &zdsapi.WorkloadInfo{Name: name, Namespace: namespace, ServiceAccount: account}
	s.remember(uid, zdsPod{info: info, namespace: file})
	return s.toNewest(func(connection *net.UnixConn) error { return s.announce(connection, uid) })
}

func (s *zdsServer) remember(uid string, pod zdsPod) {
	if _, known := s.pods[uid]; !known {
		s.order = append(s.order, uid)
	}
	s.pods[uid] = pod
}

func (s *zdsServer) del(uid string) error {
	delete(s.pods, uid)
	kept := make([]string, 0, len(s.order))
	for _, other := range s.order {
		if other != uid {
			kept = append(kept, other)
		}
	}
	s.order = kept
	request := &zdsapi.WorkloadRequest{Payload: &zdsapi.WorkloadRequest_Del{Del: &zdsapi.DelWorkload{Uid: uid}}}
	var failed error
	for _, connection := range s.connections {
		failed = errors.Join(failed, s.send(connection, "del", uid, request, nil))
	}
	return failed
}

func (s *zdsServer) announce(connection *net.UnixConn, uid string) error {
	pod := s.pods[uid]
	if pod.namespace == nil {
		request := &zdsapi.WorkloadRequest{Payload: &zdsapi.WorkloadRequest_Keep{Keep: &zdsapi.KeepWorkload{Uid: uid}}}
		return s.send(connection, "keep", uid, request, nil)
	}
	add := &zdsapi.AddWorkload{Uid: uid, WorkloadInfo: pod.info}
	request := &zdsapi.WorkloadRequest{Payload: &zdsapi.WorkloadRequest_Add{Add: add}}
	return s.send(connection, "add", uid, request, pod.namespace)
}

func (s *zdsServer) snapshot(connection *net.UnixConn) error {
	payload := &zdsapi.WorkloadRequest_SnapshotSent{SnapshotSent: &zdsapi.SnapshotSent{}}
	return s.send(connection, "snapshot", "", &zdsapi.WorkloadRequest{Payload: payload}, nil)
}

// toNewest acts on the newest connection; without one the pod waits for the next proxy.
func (s *zdsServer) toNewest(act func(*net.UnixConn) error) error {
	if len(s.connections) == 0 {
		emit("waiting", fields{"message": "no proxy is connected"})
		return nil
	}
	return act(s.connections[len(s.connections)-1])
}

// send sends one message and waits for its ack: there is never a second one under way.
func (s *zdsServer) send(connection *net.UnixConn, kind, uid string, request *zdsapi.WorkloadRequest, file *os.File) error {
	data, err := proto.Marshal(request)
	if err != nil {
		return err
	}
	if len(data) > zdsMaxMessage {
		return fmt.Errorf("a message of %d bytes is over %d", len(data), zdsMaxMessage)
	}
	var rights []byte
	if file != nil {
		rights = unix.UnixRights(int(file.Fd()))
	}
	if err := connection.SetWriteDeadline(time.Now().Add(zdsDeadline)); err != nil {
		return err
	}
	if _, _, err := connection.WriteMsgUnix(data, rights, nil); err != nil {
		s.forget(connection)
		return err
	}
	response := &zdsapi.WorkloadResponse{}
	if err := receive(connection, response); err != nil {
		s.forget(connection)
		return fmt.Errorf("ack of %s %s: %w", kind, uid, err)
	}
	ack := response.GetAck()
	if ack == nil {
		return fmt.Errorf("the answer to %s %s is no ack: %v", kind, uid, response)
	}
	emit("ack", fields{"for": kind, "uid": uid, "error": ack.Error})
	return nil
}

func (s *zdsServer) forget(gone *net.UnixConn) {
	kept := make([]*net.UnixConn, 0, len(s.connections))
	for _, connection := range s.connections {
		if connection != gone {
			kept = append(kept, connection)
		}
	}
	s.connections = kept
}

func receive(connection *net.UnixConn, message proto.Message) error {
	if err := connection.SetReadDeadline(time.Now().Add(zdsDeadline)); err != nil {
		return err
	}
	buffer := make([]byte, zdsMaxMessage)
	count, _, flags, _, err := connection.ReadMsgUnix(buffer, nil)
	if err != nil {
		return err
	}
	if count == 0 {
		return io.EOF
	}
	if flags&unix.MSG_TRUNC != 0 {
		return errors.New("the message was cut")
	}
	return proto.Unmarshal(buffer[:count], message)
}
