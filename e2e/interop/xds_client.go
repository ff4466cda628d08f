package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	"istio.io/istio/pkg/workloadapi"
	"istio.io/istio/pkg/workloadapi/security"
)

// How long the first answer to each type may take.
const syncLimit = 30 * time.Second

// How long a server may take to end a stream whose other half is closed.
const finishLimit = 5 * time.Second

// fence is a name that no resource has.
const fence = "interop.invalid/fence"

type deltaStream = discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesClient

// xdsClient keeps what it was sent across streams, as a proxy does.
type xdsClient struct {
	connection *grpc.ClientConn
	node       *core.Node
	types      []string
	versions   map[string]map[string]string // type, then name
}

func runXDSClient(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("xds-client", flag.ContinueOnError)
	var target dialFlags
	target.register(flags)
	nodeName := flags.String("node", "node-1", "name of the node to speak for")
	reconnect := flags.Bool("reconnect", false, "after the first sync, connect again with the versions held, and expect nothing back")
	follow := flags.Bool("follow", false, "then print changes until standard input ends; the line \"reconnect\" begins a new stream")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if err := required(flags, "address", "root-cert"); err != nil {
		return err
	}
	connection, err := target.dial()
	if err != nil {
		return err
	}
	defer connection.Close()
	client, err := newXDSClient(connection, *nodeName, target.cluster)
	if err != nil {
		return err
	}
	if err := client.session(ctx, nil, "initial"); err != nil {
		return err
	}
	if *reconnect {
		if err := client.session(ctx, nil, "reconnected"); err != nil {
			return err
		}
	}
	if !*follow {
		return nil
	}
	lines := stdinCommands(ctx)
	for {
		err := client.session(ctx, lines, "following")
		if !errors.Is(err, errReconnect) {
			return err
		}
	}
}

var errReconnect = errors.New("asked to reconnect")

func newXDSClient(connection *grpc.ClientConn, nodeName, cluster string) (*xdsClient, error) {
	metadata, err := structpb.NewStruct(map[string]any{
		"NAME": "ztunnel-interop", "NAMESPACE": "istio-system", "NODE_NAME": nodeName, "CLUSTER_ID": cluster, "INSTANCE_IPS": "198.51.100.1",
	})
	if err != nil {
		return nil, err
	}
	id := "ztunnel~198.51.100.1~ztunnel-interop.istio-system~istio-system.svc.cluster.local"
	return &xdsClient{
		connection: connection,
		node:       &core.Node{Id: id, Metadata: metadata},
		types:      []string{addressType, authorizationType},
		versions:   map[string]map[string]string{addressType: {}, authorizationType: {}},
	}, nil
}

// session opens one stream and acknowledges what arrives. Without lines it ends when every type was answered once; with them, when
// they end.
func (c *xdsClient) session(ctx context.Context, lines <-chan []string, phase string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := discovery.NewAggregatedDiscoveryServiceClient(c.connection).DeltaAggregatedResources(ctx)
	if err != nil {
		return refusal(err)
	}
	for _, typeURL := range c.types {
		err := c.subscribe(stream, typeURL)
		if errors.Is(err, io.EOF) {
			_, err = stream.Recv() // the server has ended the stream, and only reading tells why
		}
		if err != nil {
			return refusal(err)
		}
	}
	responses, failed := make(chan *discovery.DeltaDiscoveryResponse), make(chan error, 1)
	go func() {
		for {
			response, err := stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case responses <- response:
			case <-ctx.Done():
				return
			}
		}
	}()
	waiting := map[string]bool{} // type, and whether its fence ends the wait
	for _, typeURL := range c.types {
		waiting[typeURL] = len(c.versions[typeURL]) > 0
	}
	received := 0
	limit := time.After(syncLimit)
	for {
		select {
		case response := <-responses:
			if err := c.accept(stream, response); err != nil {
				return err
			}
			if fenced, awaited := waiting[response.TypeUrl]; awaited {
				received += len(response.Resources)
				if !fenced || slices.Contains(response.RemovedResources, fence) {
					delete(waiting, response.TypeUrl)
				}
				if len(waiting) == 0 {
					limit = nil
					emit("synced", fields{
						"phase": phase, "received": received,
						"addresses": len(c.versions[addressType]), "policies": len(c.versions[authorizationType]),
					})
				}
			}
			if len(waiting) == 0 && lines == nil {
				return finish(stream, responses, failed)
			}
		case err := <-failed:
			return refusal(err)
		case words, open := <-lines:
			if !open {
				return finish(stream, responses, failed)
			}
			if words[0] == "reconnect" {
				return errors.Join(finish(stream, responses, failed), errReconnect)
			}
		case <-limit:
			return fmt.Errorf("no answer for %v within %v", waiting, syncLimit)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// subscribe asks for a type. A server may stay silent towards a client that lacks nothing, so one that brings versions asks for a name
// that cannot exist as well: the answer to that comes after whatever the versions gave rise to.
func (c *xdsClient) subscribe(stream deltaStream, typeURL string) error {
	held := c.versions[typeURL]
	request := &discovery.DeltaDiscoveryRequest{Node: c.node, TypeUrl: typeURL, InitialResourceVersions: held}
	if err := stream.Send(request); err != nil || len(held) == 0 {
		return err
	}
	return stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: typeURL, ResourceNamesSubscribe: []string{fence}})
}

// finish closes our half and waits for the server to end the stream, so that the last acknowledgements are read.
func finish(stream grpc.ClientStream, responses <-chan *discovery.DeltaDiscoveryResponse, failed <-chan error) error {
	if err := stream.CloseSend(); err != nil {
		return err
	}
	limit := time.After(finishLimit)
	for {
		select {
		case <-responses:
		case <-failed:
			return nil
		case <-limit:
			emit("still-open", fields{"message": "the server kept the stream after our half was closed"})
			return nil
		}
	}
}

// accept checks and prints a response, then acknowledges it.
func (c *xdsClient) accept(stream deltaStream, response *discovery.DeltaDiscoveryResponse) error {
	held, known := c.versions[response.TypeUrl]
	if !known {
		return fmt.Errorf("a response of type %q, which was not asked for", response.TypeUrl)
	}
	if response.Nonce == "" {
		return errors.New("a response without a nonce")
	}
	emit("response", fields{
		"type": response.TypeUrl, "nonce": response.Nonce, "systemVersion": response.SystemVersionInfo,
		"resources": len(response.Resources), "removed": len(response.RemovedResources),
	})
	for _, resource := range response.Resources {
		if resource.Name == "" || resource.Version == "" {
			return fmt.Errorf("resource %q of version %q: both must be set", resource.Name, resource.Version)
		}
		rendered, err := decodeResource(response.TypeUrl, resource)
		if err != nil {
			return fmt.Errorf("resource %q: %w", resource.Name, err)
		}
		held[resource.Name] = resource.Version
		emit("resource", fields{
			"type": response.TypeUrl, "name": resource.Name, "version": resource.Version,
			"aliases": append([]string{}, resource.Aliases...), "resource": rendered,
		})
	}
	for _, name := range response.RemovedResources {
		if name == fence {
			continue
		}
		delete(held, name)
		emit("removed", fields{"type": response.TypeUrl, "name": name})
	}
	return stream.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: response.TypeUrl, ResponseNonce: response.Nonce})
}

// decodeResource reads a resource strictly: a field that Istio's own definition lacks is an error here.
func decodeResource(typeURL string, resource *discovery.Resource) (any, error) {
	if resource.Resource.GetTypeUrl() != typeURL {
		return nil, fmt.Errorf("holds a %q", resource.Resource.GetTypeUrl())
	}
	var message proto.Message = &workloadapi.Address{}
	if typeURL == authorizationType {
		message = &security.Authorization{}
	}
	if err := proto.Unmarshal(resource.Resource.Value, message); err != nil {
		return nil, err
	}
	if unknown := unknownBytes(message.ProtoReflect()); unknown != 0 {
		return nil, fmt.Errorf("%d bytes of unknown fields", unknown)
	}
	return render(message)
}

func refusal(err error) error {
	emit("refused", fields{"code": status.Code(err).String(), "message": status.Convert(err).Message()})
	return err
}
