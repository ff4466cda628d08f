package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"istio.io/istio/pkg/hbone"
)

// How long one exchange may take, with time for a gigabyte on a small machine.
const exchangeLimit = 2 * time.Minute

func runHBONEDial(_ context.Context, args []string) error {
	flags := flag.NewFlagSet("hbone-dial", flag.ContinueOnError)
	proxy := flags.String("proxy", "", "the HBONE server, host:port")
	target := flags.String("target", "", "authority of the CONNECT, host:port")
	cert := flags.String("cert", "", "own certificate")
	key := flags.String("key", "", "own key")
	root := flags.String("root", "", "certificates the server's chain must end in")
	expected := flags.String("expect", "", "identity the server must have")
	payload := flags.String("payload", "hello through the tunnel\n", "what to send")
	size := flags.Int64("bytes", 0, "send this many bytes of a pattern instead, and compare hashes")
	count := flags.Int("count", 1, "tunnels to open, all over one dialer")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if err := required(flags, "proxy", "target", "cert", "key", "root"); err != nil {
		return err
	}
	config, err := meshClientTLS(*cert, *key, *root, *expected)
	if err != nil {
		return err
	}
	dialer := hbone.NewDialer(hbone.Config{ProxyAddress: *proxy, TLS: config})
	for range *count {
		started := time.Now()
		tunnel, err := dialer.Dial("tcp", *target)
		if err != nil {
			return err
		}
		emit("tunnel", fields{"target": *target, "milliseconds": time.Since(started).Milliseconds()})
		if err := exchange(tunnel, *payload, *size); err != nil {
			return err
		}
	}
	return nil
}

// exchange sends and expects the same back, reading while it writes, as an echo behind a tunnel needs.
func exchange(tunnel net.Conn, payload string, size int64) error {
	defer tunnel.Close()
	if err := tunnel.SetDeadline(time.Now().Add(exchangeLimit)); err != nil {
		return err
	}
	var source io.Reader = bytes.NewReader([]byte(payload))
	expected := int64(len(payload))
	if size > 0 {
		source, expected = io.LimitReader(&pattern{}, size), size
	}
	sent := sha256.New()
	written := make(chan error, 1)
	halfCloser, halfCloses := tunnel.(interface{ CloseWrite() error })
	go func() {
		_, err := io.Copy(tunnel, io.TeeReader(source, sent))
		if err == nil && halfCloses {
			err = halfCloser.CloseWrite()
		}
		written <- err
	}()
	received := sha256.New()
	var head bytes.Buffer
	count, err := io.CopyN(io.MultiWriter(received, &limitedBuffer{buffer: &head, limit: 4096}), tunnel, expected)
	if err != nil {
		return fmt.Errorf("after %d of %d bytes: %w", count, expected, err)
	}
	if err := <-written; err != nil {
		return fmt.Errorf("sending: %w", err)
	}
	// An echo ends when its input does: the end has to come back as an end, through a tunnel as without one.
	if halfCloses {
		if extra, err := io.Copy(io.Discard, tunnel); extra != 0 || err != nil {
			return fmt.Errorf("after the last byte came %d more, error %v", extra, err)
		}
	}
	if !bytes.Equal(sent.Sum(nil), received.Sum(nil)) {
		return errors.New("what came back is not what was sent")
	}
	echoed := fields{"bytes": count, "sha256": hex.EncodeToString(received.Sum(nil)), "halfClosed": halfCloses}
	if size == 0 {
		echoed["payload"] = head.String()
	}
	emit("echo", echoed)
	return nil
}

func runDial(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("dial", flag.ContinueOnError)
	target := flags.String("target", "", "address to connect to, host:port")
	payload := flags.String("payload", "hello through the tunnel\n", "what to send")
	size := flags.Int64("bytes", 0, "send this many bytes of a pattern instead, and compare hashes")
	count := flags.Int("count", 1, "connections to open, one after another")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if err := required(flags, "target"); err != nil {
		return err
	}
	dialer := net.Dialer{Timeout: 10 * time.Second}
	for range *count {
		connection, err := dialer.DialContext(ctx, "tcp", *target)
		if err != nil {
			return err
		}
		emit("connected", fields{"target": *target, "local": connection.LocalAddr().String()})
		if err := exchange(connection, *payload, *size); err != nil {
			return err
		}
	}
	return nil
}

func runHBONEServe(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("hbone-serve", flag.ContinueOnError)
	address := flags.String("listen", "", "address to serve on, host:port")
	cert := flags.String("cert", "", "own certificate")
	key := flags.String("key", "", "own key")
	root := flags.String("root", "", "certificates a client's chain must end in")
	echo := flags.String("echo", "", "also serve TCP echo on this address")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if err := required(flags, "listen", "cert", "key", "root"); err != nil {
		return err
	}
	config, err := meshServerTLS(*cert, *key, *root)
	if err != nil {
		return err
	}
	if *echo != "" {
		if err := startEcho(ctx, *echo); err != nil {
			return err
		}
	}
	server := hbone.NewServer()
	forward := server.Handler
	server.Handler = http.HandlerFunc(func(response http.ResponseWriter, request *http.Request) {
		emit("connect", describeConnect(request))
		forward.ServeHTTP(response, request)
	})
	listener, err := net.Listen("tcp", *address)
	if err != nil {
		return err
	}
	emit("listening", fields{"address": listener.Addr().String()})
	context.AfterFunc(ctx, func() { _ = server.Close() })
	// The library's server speaks plain HTTP/2; TLS is composed outside it, so the protocol must be allowed over TLS as well.
	server.Protocols.SetHTTP2(true)
	server.TLSConfig = config
	if err := server.ServeTLS(listener, "", ""); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

func describeConnect(request *http.Request) fields {
	headers := fields{}
	for name := range request.Header {
		headers[name] = request.Header.Get(name)
	}
	described := fields{
		"method":    request.Method,
		"protocol":  request.Proto,
		"authority": request.Host,
		"remote":    request.RemoteAddr,
		"headers":   headers,
		"peer":      []string{},
	}
	if request.TLS != nil {
		described["tls"] = tls.VersionName(request.TLS.Version)
		if len(request.TLS.PeerCertificates) > 0 {
			described["peer"] = uris(request.TLS.PeerCertificates[0])
		}
	}
	return described
}

func runEcho(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("echo", flag.ContinueOnError)
	address := flags.String("listen", "", "address to serve on, host:port")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if err := required(flags, "listen"); err != nil {
		return err
	}
	if err := startEcho(ctx, *address); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}

// startEcho returns every connection's bytes to it, half-close included.
func startEcho(ctx context.Context, address string) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { _ = listener.Close() })
	emit("echo-listening", fields{"address": listener.Addr().String()})
	go func() {
		for {
			connection, err := listener.Accept()
			if err != nil {
				return
			}
			emit("echo-accepted", fields{"remote": connection.RemoteAddr().String()})
			go func() {
				defer connection.Close()
				count, err := io.Copy(connection, connection)
				closed := fields{"remote": connection.RemoteAddr().String(), "bytes": count}
				if err != nil {
					closed["error"] = err.Error()
				}
				emit("echo-closed", closed)
			}()
		}
	}()
	return nil
}

// pattern is an endless stream that repeats only after 251 bytes, so that a lost or doubled block changes the hash.
type pattern struct {
	position uint64
}

func (p *pattern) Read(buffer []byte) (int, error) {
	for index := range buffer {
		buffer[index] = byte((p.position + p.position>>16) % 251)
		p.position++
	}
	return len(buffer), nil
}

// limitedBuffer keeps the first bytes written and drops the rest.
type limitedBuffer struct {
	buffer *bytes.Buffer
	limit  int
}

func (l *limitedBuffer) Write(data []byte) (int, error) {
	if room := l.limit - l.buffer.Len(); room > 0 {
		l.buffer.Write(data[:min(room, len(data))])
	}
	return len(data), nil
}
