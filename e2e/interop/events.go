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

// render turns a message into plain JSON values with stable text: protojson varies its white space on purpose.
func render(message proto.Message) (any, error) {
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
