package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	caapi "istio.io/api/security/v1alpha1"
)

var (
	oidSAN       = asn1.ObjectIdentifier{2, 5, 29, 17}
	emptySubject = []byte{0x30, 0x00} // a SEQUENCE of nothing
)

// caServer signs what a proxy of the mesh may ask for, and refuses any request of another shape.
type caServer struct {
	caapi.UnimplementedIstioCertificateServiceServer
	authority *authority
	ttl       time.Duration
	token     string
}

// caFlags are shared by the commands that can serve certificates.
type caFlags struct {
	cert, key, token string
	ttl              time.Duration
}

func (c *caFlags) register(flags *flag.FlagSet) {
	flags.StringVar(&c.cert, "ca-cert", "", "root certificate; with --ca-key, certificates are served")
	flags.StringVar(&c.key, "ca-key", "", "root key")
	flags.DurationVar(&c.ttl, "ca-ttl", time.Hour, "longest lifetime signed")
	flags.StringVar(&c.token, "token-file", "", "the bearer token callers must present; empty accepts any")
}

func (c *caFlags) server() (*caServer, error) {
	ca, err := loadAuthority(c.cert, c.key)
	if err != nil {
		return nil, err
	}
	token, err := readToken(c.token)
	if err != nil {
		return nil, err
	}
	return &caServer{authority: ca, ttl: c.ttl, token: token}, nil
}

func runServeCA(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("serve-ca", flag.ContinueOnError)
	var listen listenFlags
	var ca caFlags
	listen.register(flags)
	ca.register(flags)
	if err := flags.Parse(args); err != nil {
		return err
	}
	if err := required(flags, "listen", "cert", "key", "ca-cert", "ca-key"); err != nil {
		return err
	}
	server, err := ca.server()
	if err != nil {
		return err
	}
	return listen.serve(ctx, func(registrar *grpc.Server) {
		caapi.RegisterIstioCertificateServiceServer(registrar, server)
	})
}

func (s *caServer) CreateCertificate(ctx context.Context, request *caapi.IstioCertificateRequest) (*caapi.IstioCertificateResponse, error) {
	if err := checkToken(ctx, s.token); err != nil {
		emit("certificate-refused", fields{"reason": err.Error()})
		return nil, status.Error(codes.Unauthenticated, err.Error())
	}
	csr, err := checkRequest(request)
	if err != nil {
		emit("certificate-refused", fields{"reason": err.Error()})
		return nil, status.Error(codes.InvalidArgument, err.Error())
	}
	ttl := s.ttl
	if asked := time.Duration(request.ValidityDuration) * time.Second; asked > 0 && asked < ttl {
		ttl = asked
	}
	leaf := template(ttl)
	leaf.URIs = csr.URIs
	certPEM, err := s.authority.sign(leaf, csr.PublicKey)
	if err != nil {
		return nil, status.Error(codes.Internal, err.Error())
	}
	emit("certificate", fields{
		"identity":  csr.URIs[0].String(),
		"requested": request.ValidityDuration,
		"notAfter":  leaf.NotAfter.Unix(),
		"serial":    leaf.SerialNumber.Text(16),
		"headers":   callHeaders(ctx),
	})
	return &caapi.IstioCertificateResponse{CertChain: []string{string(certPEM), string(s.authority.rootPEM)}}, nil
}

// checkRequest holds a request to the shape that a node proxy sends: a P-256 key, no subject, one critical SPIFFE URI, and the
// same identity named in the metadata.
func checkRequest(request *caapi.IstioCertificateRequest) (*x509.CertificateRequest, error) {
	block, rest := pem.Decode([]byte(request.Csr))
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(bytes.TrimSpace(rest)) != 0 {
		return nil, errors.New("csr: not one PEM block of CERTIFICATE REQUEST")
	}
	csr, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("csr: %w", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("csr signature: %w", err)
	}
	key, ok := csr.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("csr: the key is not on P-256")
	}
	if !bytes.Equal(csr.RawSubject, emptySubject) {
		return nil, fmt.Errorf("csr: subject %q is not empty", csr.Subject)
	}
	if !slices.ContainsFunc(csr.Extensions, isCriticalSAN) {
		return nil, errors.New("csr: no critical subject alternative name")
	}
	if len(csr.URIs) != 1 || len(csr.DNSNames)+len(csr.IPAddresses)+len(csr.EmailAddresses) != 0 {
		return nil, fmt.Errorf("csr: names %v %v %v are not exactly one URI", csr.URIs, csr.DNSNames, csr.IPAddresses)
	}
	identity := csr.URIs[0].String()
	if !strings.HasPrefix(identity, "spiffe://") {
		return nil, fmt.Errorf("csr: %s is no SPIFFE identity", identity)
	}
	impersonated := request.GetMetadata().GetFields()["ImpersonatedIdentity"].GetStringValue()
	if impersonated != identity {
		return nil, fmt.Errorf("metadata: ImpersonatedIdentity %q is not the csr's %q", impersonated, identity)
	}
	return csr, nil
}

func isCriticalSAN(extension pkix.Extension) bool {
	return extension.Id.Equal(oidSAN) && extension.Critical
}

func readToken(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	text, err := os.ReadFile(file)
	return strings.TrimSpace(string(text)), err
}

// checkToken compares the caller's bearer token; an empty expectation accepts any token, but not none.
func checkToken(ctx context.Context, expected string) error {
	headers, _ := metadata.FromIncomingContext(ctx)
	values := headers.Get("authorization")
	if len(values) != 1 {
		return fmt.Errorf("%d authorization headers", len(values))
	}
	token, found := strings.CutPrefix(values[0], "Bearer ")
	if !found || token == "" {
		return errors.New("authorization is not a bearer token")
	}
	if expected != "" && token != expected {
		return errors.New("the bearer token is not the expected one")
	}
	return nil
}

// callHeaders are the caller's own headers, for the record.
func callHeaders(ctx context.Context) fields {
	headers, _ := metadata.FromIncomingContext(ctx)
	kept := fields{}
	for name, values := range headers {
		kept[name] = strings.Join(values, ",")
	}
	return kept
}
