package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	caapi "istio.io/api/security/v1alpha1"
)

// xdsServer serves one manifest to any number of streams.
type xdsServer struct {
	discovery.UnimplementedAggregatedDiscoveryServiceServer
	file    string
	token   string
	streams atomic.Int64
	nonces  atomic.Int64

	lock       sync.Mutex
	generation int
	served     map[string]resources
	wake       map[int64]chan struct{} // one slot a stream: a wake-up that is already waiting is enough
	end        map[int64]context.CancelFunc
}

func runServeXDS(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("serve-xds", flag.ContinueOnError)
	var listen listenFlags
	var ca caFlags
	listen.register(flags)
	ca.register(flags)
	file := flags.String("manifest", "", "file of workloads, services and policies; read again on SIGHUP or the line \"reload\"")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if err := required(flags, "listen", "cert", "key", "manifest"); err != nil {
		return err
	}
	token, err := readToken(ca.token)
	if err != nil {
		return err
	}
	server := &xdsServer{file: *file, token: token, wake: map[int64]chan struct{}{}, end: map[int64]context.CancelFunc{}}
	if err := server.reload(); err != nil {
		return err
	}
	var authority *caServer
	if ca.cert != "" {
		if authority, err = ca.server(); err != nil {
			return err
		}
	}
	go server.followCommands(ctx)
	return listen.serve(ctx, func(registrar *grpc.Server) {
		discovery.RegisterAggregatedDiscoveryServiceServer(registrar, server)
		if authority != nil {
			caapi.RegisterIstioCertificateServiceServer(registrar, authority)
		}
	})
}

func (s *xdsServer) followCommands(ctx context.Context) {
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	lines := stdinCommands(ctx)
	for {
		word := "reload"
		select {
		case <-ctx.Done():
			return
		case <-hangups:
		case words, open := <-lines:
			if !open {
				lines = nil
				continue
			}
			word = words[0]
		}
		var err error
		switch word {
		case "reload":
			err = s.reload()
		case "disconnect":
			s.disconnect()
		default:
			err = fmt.Errorf("%q is not one of: reload, disconnect", word)
		}
		if err != nil {
			emit("command-failed", fields{"command": word, "message": err.Error()})
		}
	}
}

// reload reads the manifest and wakes every stream.
func (s *xdsServer) reload() error {
	loaded, err := loadManifest(s.file)
	if err != nil {
		return err
	}
	s.lock.Lock()
	defer s.lock.Unlock()
	s.generation++
	s.served = loaded
	for _, wake := range s.wake {
		select {
		case wake <- struct{}{}:
		default:
		}
	}
	emit("loaded", fields{"generation": s.generation, "addresses": len(loaded[addressType]), "policies": len(loaded[authorizationType])})
	return nil
}

func (s *xdsServer) disconnect() {
	s.lock.Lock()
	defer s.lock.Unlock()
	for _, end := range s.end {
		end()
	}
}

// StreamAggregatedResources is the state-of-the-world half, which no node proxy speaks.
func (s *xdsServer) StreamAggregatedResources(discovery.AggregatedDiscoveryService_StreamAggregatedResourcesServer) error {
	return status.Error(codes.Unimplemented, "delta only")
}

// DeltaAggregatedResources serves one proxy until it leaves or is disconnected.
func (s *xdsServer) DeltaAggregatedResources(stream discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	id := s.streams.Add(1)
	if err := checkToken(stream.Context(), s.token); err != nil {
		emit("stream-refused", fields{"stream": id, "reason": err.Error()})
		return status.Error(codes.Unauthenticated, err.Error())
	}
	emit("stream", fields{"stream": id, "headers": callHeaders(stream.Context())})
	ctx, cancel := context.WithCancel(stream.Context())
	defer cancel()
	wake := s.enter(id, cancel)
	defer s.leave(id)

	requests := make(chan *discovery.DeltaDiscoveryRequest)
	go func() {
		defer cancel()
		for {
			request, err := stream.Recv()
			if err != nil {
				return
			}
			select {
			case requests <- request:
			case <-ctx.Done():
				return
			}
		}
	}()
	session := &xdsSession{server: s, stream: stream, id: id, subscriptions: map[string]*subscription{}}
	for {
		var err error
		select {
		case <-ctx.Done():
			emit("stream-ended", fields{"stream": id})
			return status.Error(codes.Unavailable, "disconnected")
		case request := <-requests:
			err = session.handle(request)
		case <-wake:
			err = session.push()
		}
		if err != nil {
			return err
		}
	}
}

func (s *xdsServer) enter(id int64, end context.CancelFunc) <-chan struct{} {
	s.lock.Lock()
	defer s.lock.Unlock()
	wake := make(chan struct{}, 1)
	s.wake[id], s.end[id] = wake, end
	return wake
}

func (s *xdsServer) leave(id int64) {
	s.lock.Lock()
	defer s.lock.Unlock()
	delete(s.wake, id)
	delete(s.end, id)
}

func (s *xdsServer) current(typeURL string) (resources, int, bool) {
	s.lock.Lock()
	defer s.lock.Unlock()
	found, known := s.served[typeURL]
	return found, s.generation, known
}

// xdsSession is one stream's view: what it asked for and what it has.
type xdsSession struct {
	server        *xdsServer
	stream        discovery.AggregatedDiscoveryService_DeltaAggregatedResourcesServer
	id            int64
	order         []string // types in the order they were asked for
	subscriptions map[string]*subscription
}

type subscription struct {
	wildcard bool
	names    map[string]bool
	versions map[string]string
	pending  map[string]bool // nonces not yet answered
}

func (s *xdsSession) handle(request *discovery.DeltaDiscoveryRequest) error {
	known := s.subscriptions[request.TypeUrl]
	if request.ResponseNonce != "" {
		if err := s.answer(request, known); err != nil {
			return err
		}
	}
	if known == nil {
		return s.subscribe(request)
	}
	if len(request.ResourceNamesSubscribe)+len(request.ResourceNamesUnsubscribe) == 0 {
		return nil
	}
	known.change(request)
	return s.respond(request.TypeUrl, known, request.ResourceNamesSubscribe)
}

func (s *xdsSession) answer(request *discovery.DeltaDiscoveryRequest, known *subscription) error {
	if known == nil || !known.pending[request.ResponseNonce] {
		emit("stray-nonce", fields{"stream": s.id, "type": request.TypeUrl, "nonce": request.ResponseNonce})
		return status.Errorf(codes.InvalidArgument, "nonce %q was never sent for %s", request.ResponseNonce, request.TypeUrl)
	}
	delete(known.pending, request.ResponseNonce)
	if detail := request.ErrorDetail; detail != nil {
		emit("nack", fields{"stream": s.id, "type": request.TypeUrl, "nonce": request.ResponseNonce, "code": detail.Code, "message": detail.Message})
		return nil
	}
	emit("ack", fields{"stream": s.id, "type": request.TypeUrl, "nonce": request.ResponseNonce})
	return nil
}

// subscribe begins a type. What the proxy says it already has is believed.
func (s *xdsSession) subscribe(request *discovery.DeltaDiscoveryRequest) error {
	if _, _, served := s.server.current(request.TypeUrl); !served {
		return status.Errorf(codes.InvalidArgument, "type %q is not served", request.TypeUrl)
	}
	begun := &subscription{names: map[string]bool{}, versions: map[string]string{}, pending: map[string]bool{}}
	for name, version := range request.InitialResourceVersions {
		begun.versions[name] = version
	}
	// No name in the first request of a type asks for all of it.
	begun.wildcard = len(request.ResourceNamesSubscribe) == 0
	begun.change(request)
	s.subscriptions[request.TypeUrl] = begun
	s.order = append(s.order, request.TypeUrl)

	members := fields{
		"stream": s.id, "type": request.TypeUrl, "wildcard": begun.wildcard,
		"subscribe": request.ResourceNamesSubscribe, "initialVersions": len(request.InitialResourceVersions),
	}
	if node := request.Node; node != nil {
		members["node"] = node.Id
		if node.Metadata != nil {
			members["metadata"] = node.Metadata.AsMap()
		}
	}
	emit("subscribe", members)
	return s.respond(request.TypeUrl, begun, nil)
}

func (s *subscription) change(request *discovery.DeltaDiscoveryRequest) {
	for _, name := range request.ResourceNamesSubscribe {
		if name == "*" {
			s.wildcard = true
		} else {
			s.names[name] = true
		}
	}
	for _, name := range request.ResourceNamesUnsubscribe {
		if name == "*" {
			s.wildcard = false
		}
		delete(s.names, name)
	}
}

// push sends what changed, and nothing for a type that did not.
func (s *xdsSession) push() error {
	for _, typeURL := range s.order {
		known := s.subscriptions[typeURL]
		response := s.difference(typeURL, known, nil)
		if len(response.Resources)+len(response.RemovedResources) == 0 {
			continue
		}
		if err := s.send(known, response); err != nil {
			return err
		}
	}
	return nil
}

// respond answers a subscription, with an empty response if there is nothing to send: a proxy waits for it to be ready.
func (s *xdsSession) respond(typeURL string, known *subscription, asked []string) error {
	return s.send(known, s.difference(typeURL, known, asked))
}

func (s *xdsSession) send(known *subscription, response *discovery.DeltaDiscoveryResponse) error {
	known.pending[response.Nonce] = true
	names := make([]string, 0, len(response.Resources))
	for _, resource := range response.Resources {
		names = append(names, resource.Name)
	}
	emit("response", fields{
		"stream": s.id, "type": response.TypeUrl, "nonce": response.Nonce,
		"resources": names, "removed": append([]string{}, response.RemovedResources...),
	})
	err := s.stream.Send(response)
	if err != nil && errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

func (s *xdsSession) difference(typeURL string, known *subscription, asked []string) *discovery.DeltaDiscoveryResponse {
	served, generation, _ := s.server.current(typeURL)
	response := &discovery.DeltaDiscoveryResponse{
		TypeUrl:           typeURL,
		Nonce:             strconv.FormatInt(s.server.nonces.Add(1), 10),
		SystemVersionInfo: strconv.Itoa(generation),
	}
	for _, name := range served.names() {
		resource := served[name]
		if known.wants(resource) && known.versions[name] != resource.Version {
			response.Resources = append(response.Resources, resource)
			known.versions[name] = resource.Version
		}
	}
	for name := range known.versions {
		if _, exists := served[name]; !exists {
			response.RemovedResources = append(response.RemovedResources, name)
			delete(known.versions, name)
		}
	}
	for _, name := range asked {
		if name != "*" && !served.answers(name) && !slices.Contains(response.RemovedResources, name) {
			response.RemovedResources = append(response.RemovedResources, name)
		}
	}
	slices.Sort(response.RemovedResources)
	return response
}

func (s *subscription) wants(resource *discovery.Resource) bool {
	return s.wildcard || s.names[resource.Name] || slices.ContainsFunc(resource.Aliases, func(alias string) bool { return s.names[alias] })
}

// answers says whether a name or an alias leads to a resource.
func (r resources) answers(name string) bool {
	if _, exists := r[name]; exists {
		return true
	}
	for _, resource := range r {
		if slices.Contains(resource.Aliases, name) {
			return true
		}
	}
	return false
}
