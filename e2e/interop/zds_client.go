package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"istio.io/istio/pkg/zdsapi"
)

// Room for the descriptors of one message: an agent may pass listening sockets beside the namespace.
const zdsMaxDescriptors = 16

func runZDSClient(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("zds-client", flag.ContinueOnError)
	path := flags.String("socket", "", "the agent's SOCK_SEQPACKET socket")
	untilSnapshot := flags.Bool("until-snapshot", false, "end after the snapshot instead of following")
	refuse := flags.String("refuse", "", "answer the Add of this uid with an error")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if err := required(flags, "socket"); err != nil {
		return err
	}
	connection, err := net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: *path, Net: "unixpacket"})
	if err != nil {
		return err
	}
	defer connection.Close()
	context.AfterFunc(ctx, func() { _ = connection.Close() })
	if err := sendPacket(connection, &zdsapi.ZdsHello{Version: zdsapi.Version_V1}); err != nil {
		return fmt.Errorf("hello: %w", err)
	}
	emit("connected", fields{"socket": *path})
	for {
		snapshot, err := answerOne(connection, *refuse)
		if err != nil && ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return err
		}
		if snapshot && *untilSnapshot {
			return nil
		}
	}
}

// answerOne reads one message, prints it and acknowledges it. It reports whether it ended the snapshot.
func answerOne(connection *net.UnixConn, refuse string) (bool, error) {
	// One byte more than allowed, to see an agent that sends too much.
	buffer := make([]byte, zdsMaxMessage+1)
	control := make([]byte, unix.CmsgSpace(4*zdsMaxDescriptors))
	count, controlCount, flags, _, err := connection.ReadMsgUnix(buffer, control)
	if err != nil {
		return false, err
	}
	if count == 0 {
		return false, errors.New("the agent closed the connection")
	}
	if count > zdsMaxMessage || flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0 {
		return false, fmt.Errorf("a message of %d bytes or more, flags %#x, was cut", count, flags)
	}
	request := &zdsapi.WorkloadRequest{}
	if err := proto.Unmarshal(buffer[:count], request); err != nil {
		return false, err
	}
	descriptors, err := takeDescriptors(control[:controlCount])
	if err != nil {
		return false, err
	}
	members, failure := describeRequest(request)
	members["bytes"] = count
	members["unknownBytes"] = len(request.ProtoReflect().GetUnknown()) + len(request.GetAdd().ProtoReflect().GetUnknown())
	members["descriptors"] = descriptors
	emit("message", members)
	if refuse != "" && request.GetAdd().GetUid() == refuse {
		failure = "refused as asked"
	}
	ack := &zdsapi.WorkloadResponse{Payload: &zdsapi.WorkloadResponse_Ack{Ack: &zdsapi.Ack{Error: failure}}}
	return request.GetSnapshotSent() != nil, sendPacket(connection, ack)
}

func describeRequest(request *zdsapi.WorkloadRequest) (members fields, failure string) {
	switch payload := request.Payload.(type) {
	case *zdsapi.WorkloadRequest_Add:
		info := payload.Add.GetWorkloadInfo()
		return fields{
			"kind": "add", "uid": payload.Add.GetUid(), "namespace": info.GetNamespace(),
			"name": info.GetName(), "serviceAccount": info.GetServiceAccount(),
		}, ""
	case *zdsapi.WorkloadRequest_Keep:
		return fields{"kind": "keep", "uid": payload.Keep.GetUid()}, ""
	case *zdsapi.WorkloadRequest_Del:
		return fields{"kind": "del", "uid": payload.Del.GetUid()}, ""
	case *zdsapi.WorkloadRequest_SnapshotSent:
		return fields{"kind": "snapshot"}, ""
	default:
		return fields{"kind": "unknown"}, "unknown payload"
	}
}

// takeDescriptors describes and closes what came with a message.
func takeDescriptors(control []byte) ([]fields, error) {
	described := []fields{}
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil, err
	}
	for _, message := range messages {
		descriptors, err := unix.ParseUnixRights(&message)
		if err != nil {
			return nil, err
		}
		for _, descriptor := range descriptors {
			facts, err := describeNamespace(descriptor)
			if err != nil {
				return nil, err
			}
			described = append(described, facts)
			if err := os.NewFile(uintptr(descriptor), "received").Close(); err != nil {
				return nil, err
			}
		}
	}
	return described, nil
}

func sendPacket(connection *net.UnixConn, message proto.Message) error {
	data, err := proto.Marshal(message)
	if err != nil {
		return err
	}
	_, _, err = connection.WriteMsgUnix(data, nil, nil)
	return err
}
