package main

import (
	"context"
	"crypto/tls"
	"flag"
	"fmt"
	"net"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// The largest message either side accepts: what the proxies of ambient accept (Z98).
const maxMessage = 200 << 20

// listenFlags say where a control plane is served, and as whom.
type listenFlags struct {
	address, cert, key string
}

func (l *listenFlags) register(flags *flag.FlagSet) {
	flags.StringVar(&l.address, "listen", "", "address to serve on, host:port; port 0 picks one")
	flags.StringVar(&l.cert, "cert", "", "server certificate")
	flags.StringVar(&l.key, "key", "", "server key")
}

// serve runs until the context ends. Clients prove themselves with a token, not with a certificate.
func (l *listenFlags) serve(ctx context.Context, register func(*grpc.Server)) error {
	certificate, err := tls.LoadX509KeyPair(l.cert, l.key)
	if err != nil {
		return err
	}
	config := &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{certificate}, NextProtos: []string{"h2"}}
	listener, err := net.Listen("tcp", l.address)
	if err != nil {
		return err
	}
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(config)), grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage))
	register(server)
	context.AfterFunc(ctx, server.Stop)
	emit("listening", fields{"address": listener.Addr().String()})
	return server.Serve(listener)
}

// dialFlags say how a control plane is reached, and as whom.
type dialFlags struct {
	address, root, serverName, token, cluster string
}

func (d *dialFlags) register(flags *flag.FlagSet) {
	flags.StringVar(&d.address, "address", "", "the server, host:port")
	flags.StringVar(&d.root, "root-cert", "", "certificates the server's chain must end in")
	flags.StringVar(&d.serverName, "server-name", "", "name to check instead of the address")
	flags.StringVar(&d.token, "token-file", "", "bearer token to present; empty presents none")
	flags.StringVar(&d.cluster, "cluster", "Kubernetes", "cluster id header")
}

func (d *dialFlags) dial() (*grpc.ClientConn, error) {
	roots, err := loadPool(d.root)
	if err != nil {
		return nil, err
	}
	token, err := readToken(d.token)
	if err != nil {
		return nil, err
	}
	config := &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: roots, ServerName: d.serverName}
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithPerRPCCredentials(callCredentials{token: token, cluster: d.cluster}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
	}
	connection, err := grpc.NewClient("passthrough:///"+d.address, options...)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", d.address, err)
	}
	return connection, nil
}

// callCredentials adds the headers a node proxy sends with every call.
type callCredentials struct {
	token, cluster string
}

func (c callCredentials) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	headers := map[string]string{"clusterid": c.cluster}
	if c.token != "" {
		headers["authorization"] = "Bearer " + c.token
	}
	return headers, nil
}

func (callCredentials) RequireTransportSecurity() bool { return true }
