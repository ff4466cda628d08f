package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// goldenEntry is one line of index.json.
type goldenEntry struct {
	Name string `json:"name"`
	Type string `json:"type"`
	File string `json:"file"`
	JSON any    `json:"json"`
}

// runGolden writes the fixed messages, or compares the directory with them.
func runGolden(_ context.Context, args []string) error {
	flags := flag.NewFlagSet("golden", flag.ContinueOnError)
	dir := flags.String("dir", "golden", "directory of the files")
	check := flags.Bool("check", false, "compare instead of writing")
	if err := flags.Parse(args); err != nil {
		return err
	}
	files, err := goldenFiles()
	if err != nil {
		return err
	}
	if !*check {
		if err := os.MkdirAll(*dir, 0o755); err != nil {
			return err
		}
	}
	var failed error
	for name, content := range files {
		path := filepath.Join(*dir, name)
		if *check {
			failed = errors.Join(failed, compareFile(path, content))
		} else if err := os.WriteFile(path, content, 0o644); err != nil {
			return err
		}
	}
	if failed == nil {
		emit("golden", fields{"dir": *dir, "files": len(files), "checked": *check})
	}
	return failed
}

// goldenFiles gives every file's content by name. A message that leaves a field of its type empty, anywhere, is an error: the set has
// to cover all of them between its messages.
func goldenFiles() (map[string][]byte, error) {
	files := map[string][]byte{}
	index := []goldenEntry{}
	covered := coverage{}
	for _, message := range goldenMessages() {
		data, err := proto.MarshalOptions{Deterministic: true}.Marshal(message.value)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", message.name, err)
		}
		rendered, err := render(message.value)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", message.name, err)
		}
		covered.visit(message.value.ProtoReflect())
		file := message.name + ".bin"
		files[file] = data
		kind := string(message.value.ProtoReflect().Descriptor().FullName())
		index = append(index, goldenEntry{Name: message.name, Type: kind, File: file, JSON: rendered})
	}
	if missing := covered.missing(); len(missing) != 0 {
		return nil, fmt.Errorf("no golden message sets %v", missing)
	}
	text, err := json.MarshalIndent(index, "", "  ")
	if err != nil {
		return nil, err
	}
	files["index.json"] = append(text, '\n')
	return files, nil
}

func compareFile(path string, expected []byte) error {
	found, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if !bytes.Equal(found, expected) {
		return fmt.Errorf("%s is not what the messages encode to: run interop golden", path)
	}
	return nil
}

// runCheckGolden reads files that another encoder wrote for the same names and compares each message with the golden one.
func runCheckGolden(_ context.Context, args []string) error {
	flags := flag.NewFlagSet("check-golden", flag.ContinueOnError)
	candidates := flags.String("candidates", "", "directory of files to compare, named as the golden ones")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if err := required(flags, "candidates"); err != nil {
		return err
	}
	var failed error
	checked := 0
	for _, message := range goldenMessages() {
		data, err := os.ReadFile(filepath.Join(*candidates, message.name+".bin"))
		if err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		found := message.value.ProtoReflect().New().Interface()
		if err := proto.Unmarshal(data, found); err != nil {
			failed = errors.Join(failed, fmt.Errorf("%s: %w", message.name, err))
			continue
		}
		if !proto.Equal(found, message.value) {
			failed = errors.Join(failed, fmt.Errorf("%s: decodes to %v", message.name, found))
		}
		checked++
	}
	emit("checked", fields{"messages": checked})
	return failed
}

// coverage counts, for each message type of the protocols, the fields that were set at least once.
type coverage map[protoreflect.FullName]map[protoreflect.FieldNumber]bool

// ourPackages are the packages whose messages have to be covered whole; what they borrow (Any, Struct, Node) is covered where it is used.
var ourPackages = map[protoreflect.FullName]bool{
	"istio.workload": true, "istio.workload.zds": true, "istio.security": true, "istio.v1.auth": true,
}

func (c coverage) visit(message protoreflect.Message) {
	name := message.Descriptor().FullName()
	if c[name] == nil {
		c[name] = map[protoreflect.FieldNumber]bool{}
	}
	message.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		c[name][field.Number()] = true
		switch {
		case field.IsMap():
			if field.MapValue().Message() != nil {
				value.Map().Range(func(_ protoreflect.MapKey, entry protoreflect.Value) bool {
					c.visit(entry.Message())
					return true
				})
			}
		case field.Message() == nil:
		case field.IsList():
			for index := range value.List().Len() {
				c.visit(value.List().Get(index).Message())
			}
		default:
			c.visit(value.Message())
		}
		return true
	})
}

// missing names the fields of visited types that no message set, and the types of our packages that no message used.
func (c coverage) missing() []string {
	var missing []string
	packages := map[protoreflect.FullName]protoreflect.FileDescriptor{}
	for _, message := range goldenMessages() {
		file := message.value.ProtoReflect().Descriptor().ParentFile()
		packages[file.Package()] = file
	}
	for name, file := range packages {
		if ourPackages[name] {
			missing = append(missing, c.missingIn(file.Messages())...)
		}
	}
	return missing
}

func (c coverage) missingIn(messages protoreflect.MessageDescriptors) []string {
	var missing []string
	for index := range messages.Len() {
		message := messages.Get(index)
		if message.IsMapEntry() {
			continue
		}
		covered, used := c[message.FullName()]
		if !used {
			missing = append(missing, string(message.FullName()))
			continue
		}
		for number := range message.Fields().Len() {
			if field := message.Fields().Get(number); !covered[field.Number()] {
				missing = append(missing, string(field.FullName()))
			}
		}
	}
	return missing
}

// unknownBytes counts what a decoder kept without understanding it, at any depth.
func unknownBytes(message protoreflect.Message) int {
	count := len(message.GetUnknown())
	message.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		switch {
		case field.IsMap():
			if field.MapValue().Message() != nil {
				value.Map().Range(func(_ protoreflect.MapKey, entry protoreflect.Value) bool {
					count += unknownBytes(entry.Message())
					return true
				})
			}
		case field.Message() == nil:
		case field.IsList():
			for index := range value.List().Len() {
				count += unknownBytes(value.List().Get(index).Message())
			}
		default:
			count += unknownBytes(value.Message())
		}
		return true
	})
	return count
}
