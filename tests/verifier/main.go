// Command meander-verify compares what a pipeline published with the ledger that PostgreSQL kept of the changes (see
// tests/workload/src/ledger.sql).
//
// It shares no code with the runtime, and uses other client libraries, so that one mistake is not made twice.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"time"
)

type options struct {
	postgres, kafka, topicPrefix, redis, streamPrefix, proto string
	wait                                                     time.Duration
}

func main() {
	var o options
	flag.StringVar(&o.postgres, "postgres", "", "postgres://… of the captured database (the password may be in PGPASSWORD)")
	flag.StringVar(&o.kafka, "kafka", "", "host:port of Kafka, several separated by commas")
	flag.StringVar(&o.topicPrefix, "topic-prefix", "", "topicPrefix of the pipeline")
	flag.StringVar(&o.redis, "redis", "", "redis://… (left out: Redis is not compared)")
	flag.StringVar(&o.streamPrefix, "stream-prefix", "", "streamPrefix of the pipeline")
	flag.StringVar(&o.proto, "proto", "proto", "folder that holds meander/v1/change.proto")
	flag.DurationVar(&o.wait, "wait", time.Minute, "how long the sinks may take to catch up")
	flag.Parse()
	if o.postgres == "" || o.kafka == "" || o.topicPrefix == "" || o.redis != "" && o.streamPrefix == "" || flag.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "error: -postgres, -kafka and -topic-prefix are needed, and -stream-prefix with -redis")
		flag.Usage()
		os.Exit(2)
	}
	// A store that is away must not hold the caller for ever.
	ctx, cancel := context.WithTimeout(context.Background(), o.wait+5*time.Minute)
	defer cancel()
	agree, err := verify(ctx, o)
	if err != nil {
		fmt.Fprintf(os.Stderr, "error: %v\n", err)
		os.Exit(2)
	}
	if !agree {
		os.Exit(1)
	}
}

// log is a sink that can be read on and on.
type log interface {
	CatchUp(ctx context.Context) ([]Record, error)
	Close()
}

func verify(ctx context.Context, o options) (bool, error) {
	decoder, err := NewDecoder(ctx, o.proto)
	if err != nil {
		return false, err
	}
	ledger, err := ReadLedger(ctx, o.postgres)
	if err != nil {
		return false, fmt.Errorf("PostgreSQL: %w", err)
	}
	if len(ledger.Entries) == 0 {
		return false, errors.New("the ledger is empty: nothing would be compared")
	}
	deadline, cancel := context.WithTimeout(ctx, o.wait)
	defer cancel()

	kafka, err := OpenKafka(o.kafka, o.topicPrefix, ledger.Tables(), decoder)
	if err != nil {
		return false, fmt.Errorf("Kafka: %w", err)
	}
	inKafka, err := readAll(ctx, deadline, kafka, ledger.RecordCount())
	if err != nil {
		return false, fmt.Errorf("Kafka: %w", err)
	}
	result := &Result{Name: "kafka"}
	result.Totals = CompareSink(ledger, inKafka, &result.Differences)
	results := []*Result{result}

	if o.redis != "" {
		redis, err := OpenRedis(o.redis, o.streamPrefix, ledger.Tables(), decoder)
		if err != nil {
			return false, fmt.Errorf("Redis: %w", err)
		}
		inRedis, err := readAll(ctx, deadline, redis, ledger.RecordCount())
		if err != nil {
			return false, fmt.Errorf("Redis: %w", err)
		}
		result := &Result{Name: "redis"}
		result.Totals = CompareSink(ledger, inRedis, &result.Differences)
		CompareValues(inKafka, inRedis, &result.Differences)
		results = append(results, result)
	}
	return write(os.Stdout, LedgerTotals(ledger), results), nil
}

// readAll reads until there are as many records as expected or the deadline has passed, and then once more, so that what should not
// be there is seen as well.
func readAll(ctx, deadline context.Context, log log, count int) ([]Record, error) {
	defer log.Close()
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	for {
		records, err := log.CatchUp(ctx)
		if err != nil {
			return nil, err
		}
		changes := 0
		for _, record := range records {
			if record.Change.InLedger() {
				changes++
			}
		}
		if changes < count {
			select {
			case <-again.C:
				continue
			case <-deadline.Done():
			}
		}
		return log.CatchUp(ctx)
	}
}
