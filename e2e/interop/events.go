package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"sync"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// fields are the members of one event line.
type fields map[string]any

var emitLock sync.Mutex

// emit prints one event as a line of JSON.
func emit(event string, members fields) {
	line := fields{"event": event}
	for key, value := range members {
		line[key] = value
	}
	text, err := json.Marshal(line)
	if err != nil {
		text, _ = json.Marshal(fields{"event": "error", "message": fmt.Sprintf("cannot render %s: %v", event, err)})
	}
	emitLock.Lock()
	defer emitLock.Unlock()
	fmt.Fprintln(os.Stdout, string(text))
}

// render turns a message into plain JSON values with stable text: protojson varies its white space on purpose. Of an extension that
// Istio does not know only the type is shown.
func render(message proto.Message) (any, error) {
	message = proto.Clone(message)
	if err := nameUnknown(message.ProtoReflect()); err != nil {
		return nil, err
	}
	text, err := protojson.Marshal(message)
	if err != nil {
		return nil, err
	}
	var value any
	if err := json.Unmarshal(text, &value); err != nil {
		return nil, err
	}
	return value, nil
}

// nameUnknown puts the type's name in the place of every Any of a type that is not known here.
func nameUnknown(message protoreflect.Message) error {
	if extension, ok := message.Interface().(*anypb.Any); ok {
		if _, err := protoregistry.GlobalTypes.FindMessageByURL(extension.GetTypeUrl()); err == nil {
			return nil
		}
		return extension.MarshalFrom(wrapperspb.String(extension.GetTypeUrl()))
	}
	var failed error
	message.Range(func(field protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		switch {
		case field.IsMap() || field.Message() == nil:
		case field.IsList():
			for i := 0; i < value.List().Len() && failed == nil; i++ {
				failed = nameUnknown(value.List().Get(i).Message())
			}
		default:
			failed = nameUnknown(value.Message())
		}
		return failed == nil
	})
	return failed
}

// stdinCommands yields each line of standard input, split into words, and closes at its end.
func stdinCommands(ctx context.Context) <-chan []string {
	lines := make(chan []string)
	go func() {
		defer close(lines)
		scanner := bufio.NewScanner(os.Stdin)
		for scanner.Scan() {
			words := strings.Fields(scanner.Text())
			if len(words) == 0 {
				continue
			}
			select {
			case lines <- words:
			case <-ctx.Done():
				return
			}
		}
	}()
	return lines
}
